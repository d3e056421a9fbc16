// Thousands of images are made and thrown away here: their memory is kept, for the kernel would clear it each time.

#include <malloc.h>

namespace {

[[maybe_unused]] const bool kept = mallopt(M_MMAP_THRESHOLD, 32 << 20) == 1 && mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1;

}  // namespace
