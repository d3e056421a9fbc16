#pragma once
// XTS (IEEE 1619) over many sectors at once.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "crypto/block.h"
#include "qcow/key.h"

namespace qcow::crypto {

/// What a sector's tweak is made of.
struct SectorNumbers {
    std::uint64_t first = 0;
    std::uint64_t step = 1;           ///< from one sector to the next
    std::uint64_t mask = UINT64_MAX;  ///< bits of the number that count
    std::size_t sector_bytes = 512;   ///< 512, 1024, 2048 or 4096
};

/// Runs XTS on whole sectors in place. `data` is the cipher with the first half of the key, in ECB mode and in the
/// direction of the work. `tweaks` encrypts with the second half, in ECB mode. Blocks have 16 bytes. Throws what the
/// ciphers do.
void xts(BlockCipher& data, BlockCipher& tweaks, SectorNumbers numbers, std::span<std::byte> bytes);

/// AES in XTS mode with instructions that do four blocks at a time (VAES with AVX-512).
///
/// Thread safety: all functions may be called from any number of threads at once.
class WideXts {
public:
    /// Null: the processor does not have the instructions, or AES has no such key.
    static std::unique_ptr<const WideXts> make(std::span<const std::byte> key);

    WideXts() = default;
    WideXts(const WideXts&) = delete;
    WideXts& operator=(const WideXts&) = delete;
    virtual ~WideXts() = default;

    /// Runs it on whole sectors. `to` is as long as `from`, and begins at the same place or does not overlap it.
    virtual void run(Direction direction, SectorNumbers numbers, std::span<const std::byte> from,
                     std::byte* to) const = 0;
};

}  // namespace qcow::crypto
