"""The certification kit: what a backend has to do to be one.

    pytest --pyargs isthmus.testing.suite --isthmus-device=NAME

Every expectation is computed in float64 by the plainest code that says what is meant; nothing of a
vendor's, and nothing of the reference backend's, decides what is right, save for whole models,
whose tokens are compared with the reference backend's.
"""
