"""CIFAR-10, the digits and the demo's points, and batches of them in a fixed order."""

from .batches import Batches
from .load import ImageData, demo_points, load_cifar10, load_digits, load_images

__all__ = ["Batches", "ImageData", "demo_points", "load_cifar10", "load_digits", "load_images"]
