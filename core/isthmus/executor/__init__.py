"""Rows, graphs and one step on the device, in terms of the contract."""

from isthmus.executor.build import build_executor
from isthmus.executor.executor import Executor
from isthmus.executor.report import ExecutorReport

__all__ = ["Executor", "ExecutorReport", "build_executor"]
