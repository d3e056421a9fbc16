// XTS over many sectors at once, against the XTS of OpenSSL, a sector at a time.

#include "crypto/xts.h"

#include <gtest/gtest.h>

#include <cstring>

#include "crypto/kdf.h"
#include "support/bytes.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using crypto::Direction;
using crypto::SectorNumbers;

Bytes random_bytes(std::size_t size) {
    Bytes bytes(size);
    must(crypto::pbkdf2("sha1", text_bytes("any"), text_bytes("bytes"), 1, bytes));
    return bytes;
}

/// What the library makes of the bytes.
Bytes of_library(Direction direction, const Bytes& key, SectorNumbers numbers, Bytes bytes) {
    const auto cipher = crypto::openssl_cipher("aes", "xts", key, direction);
    for (std::size_t at = 0; at < bytes.size(); at += numbers.sector_bytes, numbers.first += numbers.step) {
        Bytes iv(16);
        const auto number = numbers.first & numbers.mask;
        for (std::size_t i = 0; i < sizeof(number); ++i) iv[i] = static_cast<std::byte>(number >> (8 * i));
        cipher->run(iv, std::span(bytes).subspan(at, numbers.sector_bytes));
    }
    return bytes;
}

const std::vector<SectorNumbers> all_numbers = {
    {.first = 0},
    {.first = 0xffff'fff0, .mask = 0xffff'ffff},
    {.first = 0xffff'ffff'ffff'fffa, .step = 1},
    {.first = 0x1234'5678'9abc, .step = 8, .sector_bytes = 4096},
    {.first = 2, .step = 2, .sector_bytes = 1024},
    {.first = 4, .step = 4, .sector_bytes = 2048},
};

class XtsTest : public testing::TestWithParam<std::size_t> {
protected:
    /// Calls `run` for many inputs, in both directions.
    void compare(auto run) const {
        for (const auto& numbers : all_numbers) {
            for (const std::size_t sectors : {1, 2, 7, 8, 16, 17, 33, 100}) {
                for (const auto direction : {Direction::encrypt, Direction::decrypt}) {
                    const auto plain = random_bytes(sectors * numbers.sector_bytes);
                    auto bytes = plain;
                    run(direction, numbers, bytes);
                    EXPECT_EQ(bytes, of_library(direction, key_, numbers, plain)) << numbers.first << ' ' << sectors;
                }
            }
        }
    }

    const Bytes key_ = random_bytes(GetParam());
};

TEST_P(XtsTest, AroundEcb) {
    const auto half = std::span(key_).first(key_.size() / 2);
    const auto tweaks = crypto::openssl_cipher("aes", "ecb", std::span(key_).subspan(half.size()), Direction::encrypt);
    compare([&](Direction direction, SectorNumbers numbers, std::span<std::byte> bytes) {
        crypto::xts(*crypto::openssl_cipher("aes", "ecb", half, direction), *tweaks, numbers, bytes);
    });
}

TEST_P(XtsTest, WithWideInstructions) {
    const auto wide = crypto::WideXts::make(key_);
    if (!wide) GTEST_SKIP() << "the processor does not have them";
    compare([&](Direction direction, SectorNumbers numbers, std::span<std::byte> bytes) {
        wide->run(direction, numbers, bytes, bytes.data());
    });
}

INSTANTIATE_TEST_SUITE_P(Keys, XtsTest, testing::Values(32, 64));

/// The library has no XTS with 192 bits: both ways of ours against each other.
TEST(XtsKeysTest, Of192Bits) {
    const auto key = random_bytes(48);
    const auto wide = crypto::WideXts::make(key);
    if (!wide) GTEST_SKIP() << "the processor does not have the instructions";
    const auto half = std::span(key).first(24);
    for (const auto direction : {Direction::encrypt, Direction::decrypt}) {
        auto bytes = random_bytes(40 * 512);
        auto expected = bytes;
        crypto::xts(*crypto::openssl_cipher("aes", "ecb", half, direction),
                    *crypto::openssl_cipher("aes", "ecb", std::span(key).subspan(24), Direction::encrypt), {.first = 3},
                    expected);
        wide->run(direction, {.first = 3}, bytes, bytes.data());
        EXPECT_EQ(bytes, expected);
    }
    EXPECT_FALSE(crypto::WideXts::make(random_bytes(40)));
}

}  // namespace
}  // namespace qcow::test
