"""Data: from files, tables and known names to batches of pixels."""

from nearkin.data.dataset import Dataset, Split, load_dataset
from nearkin.data.decode import IMAGE_SUFFIXES, BadImage, read_image
from nearkin.data.evaluation import Evaluation, load_for_evaluation
from nearkin.data.images import Arrays, Files, ImageSource
from nearkin.data.loader import WorkersDied, eval_loader, train_loader
from nearkin.data.mixing import mix
from nearkin.data.order import SampleKey, TrainOrder, sample_seed
from nearkin.data.samplers import Draw, Draws, drawing, epoch_order
from nearkin.data.scan import BadImages, write_bad_files
from nearkin.data.sources import resolve
from nearkin.data.transforms import EvalSpec, TrainSpec, eval_transform, train_transform

__all__ = [
    "IMAGE_SUFFIXES",
    "Arrays",
    "BadImage",
    "BadImages",
    "Dataset",
    "Draw",
    "Draws",
    "EvalSpec",
    "Evaluation",
    "Files",
    "ImageSource",
    "SampleKey",
    "Split",
    "TrainOrder",
    "TrainSpec",
    "WorkersDied",
    "drawing",
    "epoch_order",
    "eval_loader",
    "eval_transform",
    "load_dataset",
    "load_for_evaluation",
    "mix",
    "read_image",
    "resolve",
    "sample_seed",
    "train_loader",
    "train_transform",
    "write_bad_files",
]
