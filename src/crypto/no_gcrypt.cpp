// In place of gcrypt.cpp, where there is no libgcrypt.

#include "crypto/block.h"

namespace qcow::crypto {

std::unique_ptr<BlockCipher> gcrypt_cipher(std::string_view, std::string_view, std::span<const std::byte>, Direction) {
    return nullptr;
}

const std::string_view missing_cipher_remedy =
    "aes is; for others, install libgcrypt (Debian: libgcrypt20-dev) and build again";

}  // namespace qcow::crypto
