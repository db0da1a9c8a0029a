"""Static shapes for devices that compile: a bucket a graph, KV in place, sampling without a sort.

A backend over this library brings a torch device, the name of its Dynamo compiler and its buckets;
:class:`isthmus_static.backend.StaticBackend` puts the parts together.
"""
