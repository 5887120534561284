"""Iterative Reasoning Preference Optimization (arXiv 2404.19733): sample, grade, pair, train, evaluate, and again.

files      the project's root, files that are whole or not there, hashes, locks, errors
metrics    accuracy with intervals, pass@k, maj@k, AUC, best of N
progress   what is done, of how much, for the person who waits
settings   every parameter, with its range and default
answers    text -> answer -> the same?
tasks      problems, prompts, what a right answer is; grading
model      the room that imports torch: loading, prompts, sampling, log-probabilities, losses, training
methods    what makes a method: recipes, the table of parts, selections, sampler, trainer
loop       IRPO on one page, in memory
run        stages on disk: configuration, presets, keys and manifests, the driver
report     tables, figures, publishing
site       the book of the project: its pages, and the executed notebooks as pages
extras     not needed by IRPO: judge, ExPO, process feedback, programs, vLLM, servers, Ray, TRL, benchmark, seed model

A room imports from those above it alone, and none of them from `extras`, whose parts are named in a table.
"""

import logging
import warnings

# Libraries' notices that a reader of a notebook can do nothing about.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional CPU kernels that are not installed
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm asks for widgets; our bars are plain text
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft calls transformers so
