"""Triton kernels for serving many LoRA adapters over one base model, each beside a plain torch reference."""
