"""Iterative Reasoning Preference Optimization (arXiv 2404.19733): the loop of sampling, pairing and training."""

import logging
import warnings

# Libraries' notices that a reader of a notebook can do nothing about.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional CPU kernels that are not installed
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm asks for widgets; we show no bars
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft calls transformers so
