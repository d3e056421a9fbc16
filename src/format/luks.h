#pragma once
// The LUKS1 header: bytes in, checked structure out, and back. Source: the LUKS1 on-disk format specification, version
// 1.2.3, section 2.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "qcow/error.h"
#include "qcow/image.h"

namespace qcow::format {

inline constexpr std::size_t luks1_header_bytes = 592;
inline constexpr std::size_t luks_sector_bytes = 512;
inline constexpr std::size_t luks_salt_bytes = 32;
/// The specification allows others, but nobody writes them.
inline constexpr std::uint32_t luks_stripes = 4000;

/// A place for the key of the data, encrypted with a passphrase.
struct LuksSlot {
    bool used = false;
    bool marked = true;  ///< as used or as unused; one that is not marked is not used
    std::uint32_t iterations = 0;
    std::array<std::byte, luks_salt_bytes> salt = {};
    std::uint32_t material_sector = 0;  ///< where its key material begins, in sectors of the header's area
    std::uint32_t stripes = luks_stripes;
};

struct Luks1Header {
    std::string cipher;                ///< "aes"
    std::string mode;                  ///< "xts-plain64"
    std::string hash;                  ///< "sha256"
    std::uint32_t payload_sector = 0;  ///< where the data begin; 0: the header is detached
    std::uint32_t key_bytes = 0;
    std::array<std::byte, 20> digest = {};  ///< of the key of the data
    std::array<std::byte, luks_salt_bytes> salt = {};
    std::uint32_t iterations = 0;
    std::string uuid;
    std::array<LuksSlot, 8> slots = {};

    /// The bytes of the key material of a slot.
    [[nodiscard]] std::uint64_t material_bytes() const { return std::uint64_t{key_bytes} * luks_stripes; }
};

/// Whether the bytes of a file begin as LUKS does, of whatever version.
bool is_luks(std::span<const std::byte> start);

/// Whether they begin as the header of LUKS2 does.
bool is_luks2(std::span<const std::byte> start);

/// Parses the header. Errors: Errc::unsupported for another version, Errc::corrupt.
Result<Luks1Header> parse_luks1_header(std::span<const std::byte> header);

/// Verifies what opening and changing slots rely on: that all key material lies behind the header, in its area of
/// `area_bytes`, without overlaps, and that no number is absurd. Errors: Errc::unsupported, Errc::corrupt.
Result<void> verify_luks1(const Luks1Header& header, std::uint64_t area_bytes);

/// Returns the header's bytes. Names are cut to their fields.
std::vector<std::byte> encode_luks1_header(const Luks1Header& header);

/// What the header tells without a key.
Result<EncryptionInfo> parse_luks1(std::span<const std::byte> header);

}  // namespace qcow::format
