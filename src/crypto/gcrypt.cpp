// The ciphers that OpenSSL does not have by default: serpent, twofish, cast5, and AES with 192 bits in XTS mode.

#include <gcrypt.h>

#include <array>
#include <new>

#include "crypto/block.h"

namespace qcow::crypto {
namespace {

struct Variant {
    std::string_view cipher;
    std::size_t key_bytes;
    int algorithm;
};
constexpr std::array variants = {
    Variant{"aes", 16, GCRY_CIPHER_AES128},         Variant{"aes", 24, GCRY_CIPHER_AES192},
    Variant{"aes", 32, GCRY_CIPHER_AES256},         Variant{"serpent", 16, GCRY_CIPHER_SERPENT128},
    Variant{"serpent", 24, GCRY_CIPHER_SERPENT192}, Variant{"serpent", 32, GCRY_CIPHER_SERPENT256},
    Variant{"twofish", 16, GCRY_CIPHER_TWOFISH128}, Variant{"twofish", 32, GCRY_CIPHER_TWOFISH},
    Variant{"cast5", 16, GCRY_CIPHER_CAST5},
};

/// Makes the library ready, once in a process, unless the program has done so.
bool initialize() {
    static const bool ready = [] {
        if (gcry_control(GCRYCTL_INITIALIZATION_FINISHED_P) != 0) return true;
        if (gcry_check_version(nullptr) == nullptr) return false;
        gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
        gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
        return true;
    }();
    return ready;
}

class GcryptCipher final : public BlockCipher {
public:
    GcryptCipher(gcry_cipher_hd_t handle, Direction direction) : handle_(handle), direction_(direction) {}
    ~GcryptCipher() override { gcry_cipher_close(handle_); }

    void run(std::span<const std::byte> iv, std::span<std::byte> bytes) override {
        const bool ready = iv.empty() || gcry_cipher_setiv(handle_, iv.data(), iv.size()) == 0;
        auto* const work = direction_ == Direction::encrypt ? gcry_cipher_encrypt : gcry_cipher_decrypt;
        if (!ready || work(handle_, bytes.data(), bytes.size(), nullptr, 0) != 0) throw std::bad_alloc();
    }

private:
    gcry_cipher_hd_t handle_;
    Direction direction_;
};

}  // namespace

std::unique_ptr<BlockCipher> gcrypt_cipher(std::string_view cipher, std::string_view mode,
                                           std::span<const std::byte> key, Direction direction) {
    if (!initialize()) return nullptr;
    const bool xts = mode == "xts";
    const int library_mode = xts             ? GCRY_CIPHER_MODE_XTS
                             : mode == "cbc" ? GCRY_CIPHER_MODE_CBC
                             : mode == "ecb" ? GCRY_CIPHER_MODE_ECB
                                             : 0;
    if (library_mode == 0 || (xts && cipher == "cast5")) return nullptr;
    for (const auto& variant : variants) {
        if (variant.cipher != cipher || variant.key_bytes * (xts ? 2 : 1) != key.size()) continue;
        gcry_cipher_hd_t handle = nullptr;
        if (gcry_cipher_open(&handle, variant.algorithm, library_mode, 0) != 0) return nullptr;
        auto made = std::make_unique<GcryptCipher>(handle, direction);
        if (gcry_cipher_setkey(handle, key.data(), key.size()) != 0) return nullptr;
        return made;
    }
    return nullptr;
}

const std::string_view missing_cipher_remedy = "aes, serpent, twofish and cast5 are";

}  // namespace qcow::crypto
