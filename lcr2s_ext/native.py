"""Found in place of the compiled module where that was not built: an extension of this name comes first."""

raise ImportError(
    "lcr2s_ext.native is not part of this installation (LCR2S_PURE=1 builds without it). It draws support sets "
    "(SupportIndex.from_ids) and samples batches (lcr2s_ext.data); install with a C++ compiler to have it"
)
