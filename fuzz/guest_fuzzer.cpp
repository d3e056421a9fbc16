#include <cstdint>

#include "fuzz/inputs.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    qcow::fuzz::run_guest_input({reinterpret_cast<const std::byte*>(data), size});
    return 0;
}
