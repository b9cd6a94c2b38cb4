"""What limits each kernel: the reasoning behind the floors, for docs/performance.md."""

CPU = {
    "attention-fwd": (
        "Bound by the multiply-add ports. Of 16 scores at D = 64, the two products take 128 "
        "vector operations and the softmax about 13 more on the same ports, so no kernel of "
        "this kind passes about 91 % of the floor (95 % at D = 128); causal tiles on the "
        "diagonal add work that is masked. bf16 is multiplied in pairs where the processor has "
        "fast instructions for it, and then the softmax, which stays fp32, weighs twice as much; "
        "elsewhere, and in fp16 always, it is widened to fp32."
    ),
    "attention-bwd": (
        "Bound by the multiply-add ports: five products for the forward pass's two. The scores "
        "are computed again, and dQ is summed over blocks of keys through memory."
    ),
    "decode": (
        "Bound by reading keys and values once. The floor is a sum over as many bytes in the same "
        "rounds: what memory gives changes from minute to minute on shared machines, and caches "
        "are not cleared between calls."
    ),
    "varlen": "As dense attention; short sequences leave tiles partly empty.",
    "cross-entropy": (
        "The floor is memory's: a sum over the logits or, with their gradient, a copy of them, in "
        "place a multiplication, in the same rounds. Arithmetic is as near a limit: an exponential "
        "a logit, two with the gradient, take nearly as long from the L3 cache (Zen 5, a thread). "
        "A fresh gradient costs the operating system's page faults on top; the copy has none."
    ),
    "linear-cross-entropy": (
        "Bound by three matrix products: torch.mm's, or our own where torch's are slow (on AMD's "
        "AVX-512 processors). The logits of a chunk go through memory between them."
    ),
    "train-step": (
        "Most of a step is matrix products: torch.mm's for all, but where that is far from the "
        "processor's multiply-adds (on AMD's AVX-512 processors) ours are our own. The other "
        "differences are attention, the loss, and what elementwise passes cost in memory traffic."
    ),
    "features": (
        "As dense attention, plus what each feature does to every score. Biases and masks are "
        "read once."
    ),
    "import-and-build": "Nearly all of the import is torch's own.",
}
CUDA = {
    "attention-fwd": (
        "Bound by the tensor cores. On Hopper an SM makes 4096 FLOPs of products a clock and 16 "
        "exponentials, so at D = 64 the softmax takes as long as the products and only what runs "
        "beside them is hidden."
    ),
    "attention-bwd": (
        "Bound by the tensor cores. The floor counts five products. Hopper's kernels make five and "
        "sum dQ in global memory; the others make seven, S and dP twice, so that no two blocks add "
        "to one gradient: at most 71 % of the floor."
    ),
    "decode": "Bound by reading keys and values once, and by launch latency at small batches.",
    "varlen": "As dense attention; short sequences leave tiles partly empty.",
    "cross-entropy": "Bound by memory: one read of the logits, one write of their gradient.",
    "linear-cross-entropy": (
        "Bound by three matrix products, which are torch.mm's, and by the logits' way through "
        "memory between them."
    ),
    "train-step": "Matrix products, then attention, the loss and elementwise passes.",
    "features": "As dense attention, plus what each feature does to every score.",
    "ladder": "Each rung by something else: benchmarks/ladder says what.",
    "import-and-build": "Nearly all of the import is torch's own.",
}


def text(suite: str, device: str) -> str:
    return (CUDA if device == "cuda" else CPU).get(suite, "")
