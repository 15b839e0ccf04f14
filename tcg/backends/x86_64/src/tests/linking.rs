//! Programs of several blocks: links within the page and across pages, indirect jumps, the kick word.
