#pragma once
// Keys from passphrases, and keys spread over much space, so that they can be destroyed. Pure functions on bytes.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "qcow/key.h"

namespace qcow::crypto {

/// Returns the bytes of a digest. Errors: Errc::unsupported: this build does not have the hash, or LUKS1 does not.
Result<std::size_t> hash_size(const std::string& hash);

/// Writes the digest of `bytes` to `to`, which has hash_size() bytes. Errors: Errc::unsupported: see hash_size.
Result<void> digest(const std::string& hash, std::span<const std::byte> bytes, std::span<std::byte> to);

/// Fills `to` with a key: PBKDF2 (RFC 8018) with HMAC. Errors: Errc::unsupported: see hash_size.
Result<void> pbkdf2(const std::string& hash, std::span<const std::byte> secret, std::span<const std::byte> salt,
                    std::uint32_t iterations, std::span<std::byte> to);

/// Returns the iterations of PBKDF2 that this processor does in a second for a key of up to hash_size() bytes. Measures
/// it once for each hash. Errors: Errc::unsupported: see hash_size.
Result<double> pbkdf2_speed(const std::string& hash);

/// Splits `key` into `stripes` parts, all of which are needed to have it again: the anti-forensic splitter of LUKS.
/// `to` has key.size() * stripes bytes. Errors: Errc::unsupported: see hash_size.
Result<void> split(const std::string& hash, std::span<const std::byte> key, std::span<std::byte> to);
/// The reverse.
Result<void> merge(const std::string& hash, std::span<const std::byte> parts, std::span<std::byte> key);

/// Fills `to` with bytes of a cryptographic random number generator.
void fill_random(std::span<std::byte> to);

/// Whether the bytes are equal. The time does not depend on where they differ.
bool equal(std::span<const std::byte> a, std::span<const std::byte> b);

}  // namespace qcow::crypto
