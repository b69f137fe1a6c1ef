//! Validation of the MODEL and TENSORS sections against the extents.
