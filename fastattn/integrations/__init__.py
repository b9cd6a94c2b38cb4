"""Other libraries' ways in: `fastattn.integrations.transformers`. Each is imported on its own."""
