"""Files that run elsewhere, made from a deployed model: the public functions, each in a module of its own.

Nothing of this is loaded before it is called: an exporter's libraries are needed only by those who use it.
"""

from __future__ import annotations
