#pragma once
// The encryption of disks, sector by sector. Pure functions on bytes.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "qcow/error.h"

namespace qcow::crypto {

/// Sectors are counted in this unit. A sector of 4096 bytes has the number of the first of its units.
inline constexpr std::size_t sector_unit = 512;

/// Encrypts and decrypts whole sectors. The keys stay in the library's contexts, which are wiped at the end.
///
/// Thread safety: all functions may be called from any number of threads at once.
class SectorCipher {
public:
    /// `cipher`: "aes", "serpent", "twofish" or "cast5". `mode`: the chaining mode and the initialisation vectors as
    /// headers of LUKS write them: "xts-plain64", "cbc-essiv:sha256", "ecb", ... The length of the key selects the
    /// variant of the cipher. `sector_bytes`: 512, 1024, 2048 or 4096.
    /// Errors: Errc::unsupported, with the name: no such cipher, mode or hash in this build, or not with this key.
    static Result<std::shared_ptr<const SectorCipher>> make(std::string_view cipher, std::string_view mode,
                                                            std::span<const std::byte> key,
                                                            std::size_t sector_bytes = sector_unit);

    SectorCipher() = default;
    SectorCipher(const SectorCipher&) = delete;
    SectorCipher& operator=(const SectorCipher&) = delete;
    virtual ~SectorCipher() = default;

    /// Returns the length of a sector: the unit of encryption, with an initialisation vector of its own.
    [[nodiscard]] virtual std::size_t sector_bytes() const = 0;

    /// Encrypts whole sectors, the first of which has the number `sector`, to the front of `to`. `from` and `to` begin
    /// at the same place, or do not overlap. Throws std::bad_alloc.
    virtual void encrypt(std::uint64_t sector, std::span<const std::byte> from, std::span<std::byte> to) const = 0;
    void encrypt(std::uint64_t sector, std::span<std::byte> bytes) const { encrypt(sector, bytes, bytes); }

    /// Decrypts whole sectors in place. Throws std::bad_alloc.
    virtual void decrypt(std::uint64_t sector, std::span<std::byte> bytes) const = 0;
};

}  // namespace qcow::crypto
