#pragma once
// A block cipher in a mode, from one of the libraries of cryptography.

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace qcow::crypto {

enum class Direction : bool { decrypt, encrypt };

/// Not thread-safe.
class BlockCipher {
public:
    BlockCipher() = default;
    BlockCipher(const BlockCipher&) = delete;
    BlockCipher& operator=(const BlockCipher&) = delete;
    virtual ~BlockCipher() = default;

    /// Encrypts or decrypts `bytes` in place, whole blocks, with an initialisation vector (none for "ecb"). Throws
    /// std::bad_alloc.
    virtual void run(std::span<const std::byte> iv, std::span<std::byte> bytes) = 0;
};

/// `cipher`, `mode`: "aes", "xts" and so on. Null: the library does not have it, or not with such a key.
std::unique_ptr<BlockCipher> openssl_cipher(std::string_view cipher, std::string_view mode,
                                            std::span<const std::byte> key, Direction direction);
std::unique_ptr<BlockCipher> gcrypt_cipher(std::string_view cipher, std::string_view mode,
                                           std::span<const std::byte> key, Direction direction);

/// Why a cipher may be missing, and what helps.
extern const std::string_view missing_cipher_remedy;

}  // namespace qcow::crypto
