//! AVX2 and F16C.
use crate::arch::Kernels;

pub(crate) struct Avx2(());

/// The back-end, if this CPU (with `std`) or this build (without) has the features.
pub(crate) fn get() -> Option<&'static dyn Kernels> {
    #[cfg(any(test, feature = "std"))]
    let available = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    #[cfg(not(any(test, feature = "std")))]
    let available = cfg!(all(target_feature = "avx2", target_feature = "f16c"));
    if available { Some(&Avx2(())) } else { None }
}

impl Kernels for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }
}
