"""What limits each kernel: the reasoning behind the floors, for docs/performance.md."""

CPU = {
    "attention-fwd": (
        "Bound by the multiply-add ports. Of 16 scores at D = 64, the two products take 128 "
        "vector operations and the softmax about 13 more on the same ports, so no kernel of "
        "this kind passes about 91 % of the floor (95 % at D = 128); causal tiles on the "
        "diagonal add work that is masked. 16-bit inputs are widened to fp32, so on processors "
        "with fast bf16 products their floor, which counts those, is out of reach."
    ),
    "attention-bwd": (
        "Bound by the multiply-add ports: five products for the forward pass's two. The scores "
        "are computed again, and dQ is summed over blocks of keys through memory."
    ),
    "decode": (
        "Bound by reading keys and values once. Caches are not cleared between calls: where K "
        "and V fit in them, more than 100 % is no mistake."
    ),
    "varlen": "As dense attention; short sequences leave tiles partly empty.",
    "cross-entropy": (
        "Bound by memory: one read of the logits, and one write of their gradient. Into fresh "
        "memory the operating system's page faults come on top; in place there are none."
    ),
    "linear-cross-entropy": (
        "Bound by three matrix products, which are torch.mm's: what is above its speed is not "
        "ours to gain without a matrix product of our own."
    ),
    "train-step": (
        "Most of a step is torch.mm's matrix products, the same for all; the differences are "
        "attention, the loss, and what elementwise passes cost in memory traffic."
    ),
    "features": (
        "As dense attention, plus what each feature does to every score. Biases and masks are "
        "read once."
    ),
    "import-and-build": "Nearly all of the import is torch's own.",
}
CUDA = {
    "attention-fwd": (
        "Bound by the tensor cores; the exponentials of the softmax run beside them on units "
        "sixteen times slower, which at D = 64 take about as long as the products."
    ),
    "attention-bwd": "Bound by the tensor cores: five products, with dQ summed through memory.",
    "decode": "Bound by reading keys and values once, and by launch latency at small batches.",
    "varlen": "As dense attention; short sequences leave tiles partly empty.",
    "cross-entropy": "Bound by memory: one read of the logits, one write of their gradient.",
    "linear-cross-entropy": (
        "Bound by three matrix products, which are torch.mm's, and by the logits' way through "
        "memory between them."
    ),
    "train-step": "Matrix products, then attention, the loss and elementwise passes.",
    "features": "As dense attention, plus what each feature does to every score.",
    "import-and-build": "Nearly all of the import is torch's own.",
}


def text(suite: str, device: str) -> str:
    return (CUDA if device == "cuda" else CPU).get(suite, "")
