"""An actor of Ray, and arrays sent to it and back; no model."""

from __future__ import annotations

import numpy
import ray

PACKAGES = ["ray", "numpy"]

#: One byte of each page is read by whoever receives an array.
PAGE_BYTES = 4096


@ray.remote(num_cpus=1)
class Other:
    def __init__(self):
        self.messages = 0
        self.arrays = {}

    def take(self, array):
        self.messages += 1
        return read(array)

    def give(self, num_bytes):
        if num_bytes not in self.arrays:
            self.arrays[num_bytes] = numpy.ones(num_bytes, numpy.uint8)
        return self.arrays[num_bytes]

    def told(self):
        return self.messages


def make(folder, dtype):
    ray.init(include_dashboard=False, log_to_driver=False)
    other = Other.remote()
    ray.get(other.told.remote())
    ways = {"there": there, "back": back, "tell": tell}
    return lambda request: ways[request["way"]](other, request["num_bytes"], request["calls"])


def there(other, num_bytes, calls):
    array = numpy.ones(num_bytes, numpy.uint8)
    for _ in range(calls):
        ray.get(other.take.remote(array))
    return [calls]


def back(other, num_bytes, calls):
    for _ in range(calls):
        read(ray.get(other.give.remote(num_bytes)))
    return [calls]


def tell(other, num_bytes, calls):
    array = numpy.ones(num_bytes, numpy.uint8)
    for _ in range(calls):
        other.take.remote(array)
    return [ray.get(other.told.remote())]


def read(array):
    return int(array[::PAGE_BYTES].sum())
