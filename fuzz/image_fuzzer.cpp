#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fuzz/image_builder.h"
#include "fuzz/inputs.h"

using namespace qcow::fuzz;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    run_image_input({reinterpret_cast<const std::byte*>(data), size});
    return 0;
}

/// Half of the mutations know the format: they damage a field, or begin with a new image. The others are blind.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
    Random random(seed);
    const auto dice = random.below(100);
    if (dice >= 55) return LLVMFuzzerMutate(data, size, max_size);
    auto files = dice < 6 ? build_image(random) : parse_files({reinterpret_cast<const std::byte*>(data), size});
    if (dice >= 2) {
        for (auto i = 1 + random.below(3); i > 0; --i) damage(files, random);
    }
    const auto out = encode_files(files);
    if (out.empty() || out.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
    std::memcpy(data, out.data(), out.size());
    return out.size();
}
