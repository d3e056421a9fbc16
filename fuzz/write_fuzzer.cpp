#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fuzz/inputs.h"
#include "fuzz/write_program.h"

using namespace qcow::fuzz;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    run_write_input({reinterpret_cast<const std::byte*>(data), size});
    return 0;
}

/// Most mutations know what they change: the program, the image, or both for new ones. Some are blind.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
    Random random(seed);
    const auto dice = random.below(100);
    if (dice >= 85) return LLVMFuzzerMutate(data, size, max_size);
    std::span rest(reinterpret_cast<const std::byte*>(data), size);
    auto program = WriteProgram::take(rest);
    auto files = parse_files(rest);
    if (dice < 12) {
        files = build_image(random);
        if (random.chance(50)) program = build_program(random);
    }
    if (dice >= 6) {
        for (auto i = 1 + random.below(4); i > 0; --i) change(program, random);
    }
    // Sound images are the ones whose contents are verified.
    if (dice >= 60) {
        for (auto i = 1 + random.below(3); i > 0; --i) damage(files, random);
    }
    auto out = program.encode();
    const auto image = encode_files(files);
    out.insert(out.end(), image.begin(), image.end());
    if (out.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
    std::memcpy(data, out.data(), out.size());
    return out.size();
}
