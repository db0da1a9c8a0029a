"""KV blocks: the pool, each row's block table, and the radix prefix cache.  No torch."""

from isthmus.cache.manager import BlockManager, TableEdits
from isthmus.cache.pool import BlockPool
from isthmus.cache.prefix import PrefixCache

__all__ = ["BlockManager", "BlockPool", "PrefixCache", "TableEdits"]
