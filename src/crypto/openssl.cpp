#include <fmt/format.h>
#include <fmt/ranges.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <ctime>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "base/endian.h"
#include "base/try.h"
#include "crypto/block.h"
#include "crypto/kdf.h"
#include "qcow/text.h"

namespace qcow::crypto {
namespace {

const unsigned char* raw(std::span<const std::byte> bytes) {
    return reinterpret_cast<const unsigned char*>(bytes.data());
}
unsigned char* raw(std::span<std::byte> bytes) { return reinterpret_cast<unsigned char*>(bytes.data()); }

/// OpenSSL's functions fail here for want of memory alone.
void verify(int succeeded) {
    if (succeeded != 1) throw std::bad_alloc();
}

template <class T, void (*release)(T*)>
struct Release {
    void operator()(T* object) const { release(object); }
};
using CipherContext = std::unique_ptr<EVP_CIPHER_CTX, Release<EVP_CIPHER_CTX, EVP_CIPHER_CTX_free>>;
using Cipher = std::unique_ptr<EVP_CIPHER, Release<EVP_CIPHER, EVP_CIPHER_free>>;
using Hash = std::unique_ptr<EVP_MD, Release<EVP_MD, EVP_MD_free>>;
using HashContext = std::unique_ptr<EVP_MD_CTX, Release<EVP_MD_CTX, EVP_MD_CTX_free>>;

class OpensslCipher final : public BlockCipher {
public:
    explicit OpensslCipher(CipherContext context) : context_(std::move(context)) {}

    void run(std::span<const std::byte> iv, std::span<std::byte> bytes) override {
        if (!iv.empty()) verify(EVP_CipherInit_ex(context_.get(), nullptr, nullptr, nullptr, raw(iv), -1));
        int length = 0;
        verify(EVP_CipherUpdate(context_.get(), raw(bytes), &length, raw(bytes), static_cast<int>(bytes.size())));
    }

private:
    CipherContext context_;
};

/// The hashes of LUKS1, by the names that its headers have for them.
Result<Hash> find_hash(const std::string& name) {
    static constexpr std::array known = {"sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"};
    if (std::ranges::find(known, name) != known.end()) {
        if (Hash hash(EVP_MD_fetch(nullptr, name.c_str(), nullptr)); hash) return hash;
    }
    return fail(Errc::unsupported, "LUKS",
                fmt::format("the hash \"{}\" is not supported; {} are", printable(name), fmt::join(known, ", ")));
}

/// Replaces each piece of the key with its hash, so that every bit of it depends on many.
class Diffusion {
public:
    explicit Diffusion(const EVP_MD* hash) : hash_(hash), context_(EVP_MD_CTX_new()), digest_(EVP_MAX_MD_SIZE) {
        if (!context_) throw std::bad_alloc();
    }

    void apply(std::span<std::byte> key) {
        const auto size = static_cast<std::size_t>(EVP_MD_get_size(hash_));
        for (std::size_t at = 0, index = 0; at < key.size(); at += size, ++index) {
            const auto piece = key.subspan(at, std::min(size, key.size() - at));
            std::array<std::byte, 4> number;
            store_be(std::span<std::byte>(number), 0, static_cast<std::uint32_t>(index));
            verify(EVP_DigestInit_ex2(context_.get(), hash_, nullptr));
            verify(EVP_DigestUpdate(context_.get(), number.data(), number.size()));
            verify(EVP_DigestUpdate(context_.get(), piece.data(), piece.size()));
            verify(EVP_DigestFinal_ex(context_.get(), raw(digest_.bytes()), nullptr));
            std::ranges::copy(digest_.bytes().first(piece.size()), piece.begin());
        }
    }

private:
    const EVP_MD* hash_;
    HashContext context_;
    Secret digest_;
};

void add(std::span<std::byte> to, std::span<const std::byte> bytes) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] ^= bytes[i];
}

double seconds_of_thread() {
    timespec now = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

}  // namespace

std::unique_ptr<BlockCipher> openssl_cipher(std::string_view cipher, std::string_view mode,
                                            std::span<const std::byte> key, Direction direction) {
    // Others are in a module of OpenSSL that a program has to load for all of the process.
    if (cipher != "aes") return nullptr;
    const std::size_t bits = key.size() * 8 / (mode == "xts" ? 2 : 1);
    const Cipher found(EVP_CIPHER_fetch(nullptr, fmt::format("AES-{}-{}", bits, mode).c_str(), nullptr));
    if (!found || static_cast<std::size_t>(EVP_CIPHER_get_key_length(found.get())) != key.size()) return nullptr;
    CipherContext context(EVP_CIPHER_CTX_new());
    if (!context) throw std::bad_alloc();
    // Without a vector: that of the first sector comes with it.
    if (EVP_CipherInit_ex2(context.get(), found.get(), raw(key), nullptr, static_cast<int>(direction), nullptr) != 1)
        return nullptr;
    verify(EVP_CIPHER_CTX_set_padding(context.get(), 0));
    return std::make_unique<OpensslCipher>(std::move(context));
}

Result<std::size_t> hash_size(const std::string& hash) {
    return static_cast<std::size_t>(EVP_MD_get_size(TRY(find_hash(hash)).get()));
}

Result<void> digest(const std::string& hash, std::span<const std::byte> bytes, std::span<std::byte> to) {
    const auto found = TRY(find_hash(hash));
    verify(EVP_Digest(bytes.data(), bytes.size(), raw(to), nullptr, found.get(), nullptr));
    return {};
}

Result<void> pbkdf2(const std::string& hash, std::span<const std::byte> secret, std::span<const std::byte> salt,
                    std::uint32_t iterations, std::span<std::byte> to) {
    const auto found = TRY(find_hash(hash));
    if (iterations == 0 || iterations > std::numeric_limits<int>::max())
        return fail(Errc::limit_exceeded, "LUKS", fmt::format("{} iterations of PBKDF2", iterations));
    verify(PKCS5_PBKDF2_HMAC(reinterpret_cast<const char*>(secret.data()), static_cast<int>(secret.size()), raw(salt),
                             static_cast<int>(salt.size()), static_cast<int>(iterations), found.get(),
                             static_cast<int>(to.size()), raw(to)));
    return {};
}

Result<double> pbkdf2_speed(const std::string& hash) {
    static std::mutex mutex;
    static std::map<std::string, double> measured;
    const std::lock_guard lock(mutex);
    if (const auto found = measured.find(hash); found != measured.end()) return found->second;
    constexpr double enough = 0.004;  // seconds
    constexpr unsigned samples = 5;   // other work on the machine makes some of them slow
    std::array<std::byte, 16> key = {};
    std::uint32_t iterations = 1000;
    const auto sample = [&]() -> Result<double> {
        const double begin = seconds_of_thread();
        TRY_VOID(pbkdf2(hash, key, key, iterations, key));
        return seconds_of_thread() - begin;
    };
    auto shortest = TRY(sample());
    while (shortest < enough) {
        iterations *= 4;
        shortest = TRY(sample());
    }
    for (unsigned i = 1; i < samples; ++i) shortest = std::min(shortest, TRY(sample()));
    return measured[hash] = iterations / shortest;
}

Result<void> split(const std::string& hash, std::span<const std::byte> key, std::span<std::byte> to) {
    const auto found = TRY(find_hash(hash));
    Diffusion diffusion(found.get());
    Secret sum(key.size());
    for (; to.size() > key.size(); to = to.subspan(key.size())) {
        const auto part = to.first(key.size());
        fill_random(part);
        add(sum.bytes(), part);
        diffusion.apply(sum.bytes());
    }
    std::ranges::copy(key, to.begin());
    add(to, sum.bytes());
    return {};
}

Result<void> merge(const std::string& hash, std::span<const std::byte> parts, std::span<std::byte> key) {
    const auto found = TRY(find_hash(hash));
    Diffusion diffusion(found.get());
    std::ranges::fill(key, std::byte{0});
    for (; parts.size() > key.size(); parts = parts.subspan(key.size())) {
        add(key, parts.first(key.size()));
        diffusion.apply(key);
    }
    add(key, parts);
    return {};
}

void fill_random(std::span<std::byte> to) {
    for (; !to.empty(); to = to.subspan(std::min<std::size_t>(to.size(), 1 << 20)))
        verify(RAND_priv_bytes(raw(to), static_cast<int>(std::min<std::size_t>(to.size(), 1 << 20))));
}

bool equal(std::span<const std::byte> a, std::span<const std::byte> b) {
    return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace qcow::crypto
