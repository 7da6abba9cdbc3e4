"""The largest inputs that lindm reads.

Files, models and templates of others may be hostile. Whatever they contain, reading them ends with a `DataError` in bounded time
and memory. Each limit is far above what honest inputs need; the reason stands beside it.
"""

KIB, MIB, GIB = 2**10, 2**20, 2**30

# --- files. JSON takes up to 20 times its size in memory ---------------------------------------------------------------------
JSON_FILE = 64 * MIB  # configurations, manifests, indexes: the index of a model with a trillion weights has 10 MiB
TOKENIZER_FILE = 256 * MIB  # tokenizer.json and its companions: a vocabulary of 260,000 tokens has 35 MiB
LINES_FILE = 16 * GIB  # JSON lines: examples are kept in memory, so more would not fit on a host
ROWS_ARRAY = GIB  # a JSON array of rows, which is parsed as a whole: larger data have a row per line, or are tables
LINE = 64 * MIB  # one of these lines: a task with tables of a million numbers has 20 MiB
QUESTION = MIB  # one line of questions to a policy: a history of ten thousand steps
TEXT_TEMPLATE_FILE = 256 * KIB  # templates of documents: ten thousand names of states; TOML takes quadratic time
CLAIMS_FILE = 256 * KIB  # claims of an experiment: those of lindm, all together, have 70 KiB; TOML takes quadratic time
SOURCE_FILE = MIB  # the Python file of an experiment: a hundred times the longest of lindm
POMDP_FILE = 256 * MIB  # ten million numbers, one entry each
POMDP_TABLE = 50_000_000  # numbers of one table (400 MB)
POMDP_NAMES = 1_000_000  # names of a list
POMDP_WRITES = 5_000_000_000  # numbers that all entries together write: ten tables of every kind, a minute
EPISODES_FILE = 256 * MIB  # episodes of a user's own: ten million steps, which take 3 GB in memory
MATRIX_FILE = GIB  # .npy or text: a covariance of 10,000 features has 800 MB
SOLUTION_FILE = 16 * GIB  # tables of a solver, which were in memory when it was written
SOLUTION_MEMBERS = 1000  # arrays in a solution: an APOMDP with the tables of its tree has 40
OUTPUT_FILE = 64 * MIB  # a figure or a table that a report shows
OUTPUT_PIXELS = 2**25  # of a figure that a report shows, which take 16 bytes each: 14 times the largest of lindm

# --- models ------------------------------------------------------------------------------------------------------------------
GGUF_HEADER = 256 * MIB  # a vocabulary of 260,000 tokens with its merges has 20 MiB
TOKEN = 512  # characters of a token of a SentencePiece vocabulary; the longest of published models have 64. Quadratic time
MAX_LAYERS = 2**12  # the names of all tensors are built before any tensor is read
MODEL_SIZE = 2**31 - 1  # of each size in a config.json: indices of XLA have 32 bits
WHEEL_DIRECTORY = 16 * MIB  # table of contents of a wheel: 150,000 files
COMPRESSION = 100  # largest ratio of unpacked to packed bytes in a wheel: weights do not compress that much

# --- chat templates: programs of the model's author, rendered by `lindm.llm.chat_renderer` -----------------------------------
TEMPLATE_CPU_SECONDS = 2.0  # of one conversation; templates of published models take a few milliseconds
TEMPLATE_MEMORY = GIB  # address space of the process that renders; the interpreter itself needs about 50 MiB
TEMPLATE_OUTPUT = 64 * MIB  # characters of one conversation: more than ten million tokens, beyond any context length
