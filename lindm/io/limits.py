"""The largest inputs that lindm reads. Files, models and templates of others may be hostile: whatever their content, reading them
ends with a `DataError` in bounded time and memory. Each limit is far above what honest inputs need, and has its reason beside it.
"""

KIB, MIB, GIB = 2**10, 2**20, 2**30

# --- chat templates: programs of the model's author, rendered by `lindm.llm.chat_renderer` -----------------------------------
TEMPLATE_CPU_SECONDS = 2.0  # of one conversation; templates of published models take a few milliseconds
TEMPLATE_MEMORY = GIB  # address space of the process that renders; the interpreter itself needs about 50 MiB
TEMPLATE_OUTPUT = 64 * MIB  # characters of one conversation: more than ten million tokens, beyond any context length
