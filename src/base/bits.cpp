#include "base/bits.h"

#include <cstring>

namespace qcow {

bool is_zero(std::span<const std::byte> bytes) {
    // Data is rarely zero in its first bytes: look there before comparing the whole with itself, shifted by those
    // bytes.
    constexpr std::size_t head = 16;
    std::size_t i = 0;
    for (; i < bytes.size() && i < head; ++i) {
        if (bytes[i] != std::byte{0}) return false;
    }
    return i == bytes.size() || std::memcmp(bytes.data(), bytes.data() + head, bytes.size() - head) == 0;
}

}  // namespace qcow
