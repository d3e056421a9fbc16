// In place of cipher.cpp, openssl.cpp and gcrypt.cpp, where there is no OpenSSL.

#include <algorithm>
#include <random>

#include "base/try.h"
#include "crypto/cipher.h"
#include "crypto/kdf.h"

namespace qcow::crypto {
namespace {

std::unexpected<Error> unsupported() {
    return fail(Errc::unsupported, "encryption",
                "this build neither reads nor makes encrypted data; install OpenSSL 3 (Debian: libssl-dev) and build "
                "again");
}

}  // namespace

Result<std::shared_ptr<const SectorCipher>> SectorCipher::make(std::string_view, std::string_view,
                                                               std::span<const std::byte>, std::size_t) {
    return unsupported();
}
Result<std::size_t> hash_size(const std::string&) { return unsupported(); }
Result<void> digest(const std::string&, std::span<const std::byte>, std::span<std::byte>) { return unsupported(); }
Result<void> pbkdf2(const std::string&, std::span<const std::byte>, std::span<const std::byte>, std::uint32_t,
                    std::span<std::byte>) {
    return unsupported();
}
Result<double> pbkdf2_speed(const std::string&) { return unsupported(); }
Result<void> split(const std::string&, std::span<const std::byte>, std::span<std::byte>) { return unsupported(); }
Result<void> merge(const std::string&, std::span<const std::byte>, std::span<std::byte>) { return unsupported(); }
void fill_random(std::span<std::byte> to) {
    std::random_device device;
    for (auto& byte : to) byte = static_cast<std::byte>(device());
}
bool equal(std::span<const std::byte> a, std::span<const std::byte> b) { return std::ranges::equal(a, b); }

}  // namespace qcow::crypto
