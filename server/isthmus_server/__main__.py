"""``python -m isthmus_server`` is ``isthmus``."""

from isthmus_server.cli import main

main()
