"""A device that is not there: the rules of a compiled static-shape accelerator, over the host's memory.

:func:`install` gives PyTorch's PrivateUse1 backend a vendor's name, once a process; the stand-ins for vendors' SDKs
beside this package call it when they are imported.  :func:`installed` hands tests the same :class:`FakeDevice`: its
counters, its memory and the failures it can be told to have.

It proves an engine against this model of a device, never against the vendor's.
"""

from fake_device.device import Counters, FakeDevice, install, installed

__all__ = ["Counters", "FakeDevice", "install", "installed"]
