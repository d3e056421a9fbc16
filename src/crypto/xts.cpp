#include "crypto/xts.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/endian.h"

namespace qcow::crypto {
namespace {

constexpr std::size_t block_bytes = 16;
/// The bytes and their tweaks are in the processor's nearest cache together.
constexpr std::size_t piece_bytes = 8192;
constexpr std::size_t max_sectors = piece_bytes / 512;

/// An element of GF(2^128), and the number of a sector before it is encrypted.
struct Tweak {
    std::uint64_t low = 0;
    std::uint64_t high = 0;
};

std::uint64_t little_endian(std::uint64_t value) {
    if constexpr (std::endian::native == std::endian::little) return value;
    return __builtin_bswap64(value);
}

Tweak times_x(Tweak tweak) {
    constexpr std::uint64_t polynomial = 0x87;  // x^128 = x^7 + x^2 + x + 1
    const std::uint64_t carry = tweak.high >> 63;
    return {tweak.low << 1 ^ (polynomial & (0 - carry)), tweak.high << 1 | tweak.low >> 63};
}

void add(std::span<std::byte> to, const std::byte* bytes) {
    for (std::size_t i = 0; i < to.size(); i += sizeof(std::uint64_t)) {
        std::uint64_t a;
        std::uint64_t b;
        std::memcpy(&a, to.data() + i, sizeof(a));
        std::memcpy(&b, bytes + i, sizeof(b));
        a ^= b;
        std::memcpy(to.data() + i, &a, sizeof(a));
    }
}

/// The tweaks of all blocks of some sectors.
class Tweaks {
public:
    void start(BlockCipher& cipher, SectorNumbers numbers, std::size_t sectors) {
        for (std::size_t i = 0; i < sectors; ++i)
            current_[i] = {little_endian((numbers.first + i * numbers.step) & numbers.mask), 0};
        cipher.run({}, std::as_writable_bytes(std::span(current_).first(sectors)));
        for (auto& tweak : std::span(current_).first(sectors))
            tweak = {little_endian(tweak.low), little_endian(tweak.high)};
    }

    void fill(std::size_t sectors, std::size_t blocks) {
        // The sectors do not depend on each other, so that a processor works on several at a time.
        for (std::size_t block = 0; block < blocks; ++block) {
            for (std::size_t sector = 0; sector < sectors; ++sector) {
                auto& tweak = current_[sector];
                all_[sector * blocks + block] = {little_endian(tweak.low), little_endian(tweak.high)};
                tweak = times_x(tweak);
            }
        }
    }

    [[nodiscard]] const std::byte* data() const { return reinterpret_cast<const std::byte*>(all_.data()); }

private:
    std::array<Tweak, max_sectors> current_;
    std::array<Tweak, piece_bytes / block_bytes> all_;
};

}  // namespace

void xts(BlockCipher& data, BlockCipher& tweak_cipher, SectorNumbers numbers, std::span<std::byte> bytes) {
    Tweaks tweaks;
    while (!bytes.empty()) {
        const std::size_t sectors = std::min(piece_bytes, bytes.size()) / numbers.sector_bytes;
        tweaks.start(tweak_cipher, numbers, sectors);
        const auto piece = bytes.first(sectors * numbers.sector_bytes);
        tweaks.fill(sectors, numbers.sector_bytes / block_bytes);
        add(piece, tweaks.data());
        data.run({}, piece);
        add(piece, tweaks.data());
        bytes = bytes.subspan(piece.size());
        numbers.first += sectors * numbers.step;
    }
}

}  // namespace qcow::crypto
