"""CIFAR-10, the digits and the demo's points, batches of them in a fixed order, and where the shipped files lie."""

from .batches import Batches
from .load import ImageData, demo_points, load_cifar10, load_digits, load_images
from .shipped import shipped

__all__ = ["Batches", "ImageData", "demo_points", "load_cifar10", "load_digits", "load_images", "shipped"]
