"""Triton kernels for serving many LoRA adapters over one base model, each beside a plain torch reference."""

# An unrelated distribution installs a package `kernels` too; start-up tells them apart by this.
DISTRIBUTION = "loramux"
