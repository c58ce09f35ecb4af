"""The scaling lab: runs of many sizes and budgets, the law that their losses follow, and plans made from it."""
