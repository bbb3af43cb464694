"""From a recipe to the rows that it trains on, and the report that says what they teach."""

from __future__ import annotations
