// Ciphers and key derivation against the examples of the standards.

#include "crypto/cipher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cctype>
#include <numeric>

#include "crypto/kdf.h"
#include "support/bytes.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using crypto::SectorCipher;

Bytes hex(std::string_view text) {
    Bytes bytes;
    for (std::size_t i = 0; i + 1 < text.size(); i += 2)
        bytes.push_back(static_cast<std::byte>(std::stoul(std::string(text.substr(i, 2)), nullptr, 16)));
    return bytes;
}

/// Bytes 00, 01, ... ff, 00, ...
Bytes counting(std::size_t size) {
    Bytes bytes(size);
    for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i);
    return bytes;
}

Bytes encrypted(const SectorCipher& cipher, std::uint64_t sector, Bytes bytes) {
    const auto plain = bytes;
    cipher.encrypt(sector, bytes);
    auto back = bytes;
    cipher.decrypt(sector, back);
    EXPECT_EQ(back, plain);
    return bytes;
}

/// IEEE 1619-2007, annex B: vectors 4, 5 and 10.
TEST(CipherTest, Xts) {
    const auto key128 = joined({hex("27182818284590452353602874713526"), hex("31415926535897932384626433832795")});
    const auto aes128 = must(SectorCipher::make("aes", "xts-plain64", key128));
    const auto four = encrypted(*aes128, 0, counting(512));
    EXPECT_EQ(first(four, 32), hex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"));
    EXPECT_EQ(Bytes(four.end() - 16, four.end()), hex("0a282df920147beabe421ee5319d0568"));
    const auto five = encrypted(*aes128, 1, four);
    EXPECT_EQ(first(five, 32), hex("264d3ca8512194fec312c8c9891f279fefdd608d0c027b60483a3fa811d65ee5"));

    const auto key256 = joined({hex("2718281828459045235360287471352662497757247093699959574966967627"),
                                hex("3141592653589793238462643383279502884197169399375105820974944592")});
    const auto aes256 = must(SectorCipher::make("aes", "xts-plain64", key256));
    const auto ten = encrypted(*aes256, 0xff, counting(512));
    EXPECT_EQ(first(ten, 32), hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"));
}

/// FIPS 197, annex C, by way of ECB.
TEST(CipherTest, Ecb) {
    const auto plain = hex("00112233445566778899aabbccddeeff");
    const auto block = [&](std::size_t key_bytes) {
        const auto cipher = must(SectorCipher::make("aes", "ecb", counting(key_bytes)));
        return first(encrypted(*cipher, 7, joined({plain, Bytes(496)})), 16);
    };
    EXPECT_EQ(block(16), hex("69c4e0d86a7b0430d8cdb78070b4c55a"));
    EXPECT_EQ(block(24), hex("dda97ca4864cdfe06eaf70a0ec0d7191"));
    EXPECT_EQ(block(32), hex("8ea2b7ca516745bfeafc49904b496089"));
}

/// CBC is what the standard says, made of ECB; the vectors are those of the mode.
TEST(CipherTest, CbcAndItsVectors) {
    const auto key = counting(32);
    const auto ecb = must(SectorCipher::make("aes", "ecb", key));
    Bytes essiv_key(32);
    must(crypto::digest("sha256", key, essiv_key));
    const auto essiv = must(SectorCipher::make("aes", "ecb", essiv_key));
    constexpr std::uint64_t sector = 0x1'0203'0405;
    const auto vector = [](std::uint64_t number) {
        Bytes bytes(16);
        for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<std::byte>(number >> (8 * i));
        return bytes;
    };
    auto salted = vector(sector);
    essiv->encrypt(0, salted);
    const std::vector<std::pair<std::string, Bytes>> modes = {
        {"cbc-plain64", vector(sector)}, {"cbc-plain", vector(sector & 0xffffffff)}, {"cbc-essiv:sha256", salted}};
    for (const auto& [mode, iv] : modes) {
        const auto got = encrypted(*must(SectorCipher::make("aes", mode, key)), sector, counting(512));
        auto block = iv;
        Bytes expected;
        for (std::size_t at = 0; at < 512; at += 16) {
            const auto plain = counting(512);
            for (std::size_t i = 0; i < 16; ++i) block[i] ^= plain[at + i];
            ecb->encrypt(0, block);
            expected.insert(expected.end(), block.begin(), block.end());
        }
        EXPECT_EQ(got, expected) << mode;
    }
}

TEST(CipherTest, SectorsAreNumbered) {
    const auto cipher = must(SectorCipher::make("aes", "xts-plain64", counting(64)));
    const auto both = encrypted(*cipher, 41, Bytes(1024));
    EXPECT_EQ(Bytes(both.begin() + 512, both.end()), encrypted(*cipher, 42, Bytes(512)));
    EXPECT_NE(first(both, 512), Bytes(both.begin() + 512, both.end()));
}

TEST(CipherTest, WhatIsNotSupportedIsNamed) {
    const auto refused = [](const char* cipher, const char* mode, std::size_t key_bytes) {
        const auto made = SectorCipher::make(cipher, mode, counting(key_bytes));
        return made ? std::string("made") : made.error().message();
    };
    using testing::HasSubstr;
    EXPECT_THAT(refused("camellia", "xts-plain64", 64), HasSubstr("camellia-xts-plain64 with a key of 512 bits"));
    EXPECT_THAT(refused("aes", "lrw-plain64", 48), HasSubstr("xts, cbc and ecb"));
    EXPECT_THAT(refused("aes", "cbc-null", 32), HasSubstr("plain64"));
    EXPECT_THAT(refused("aes", "cbc-essiv:whirlpool", 32), HasSubstr("\"whirlpool\""));
    EXPECT_THAT(refused("aes", "xts-plain64", 5), HasSubstr("40 bits"));
    EXPECT_THAT(refused("aes", "cbc-essiv:sha1", 32), HasSubstr("not supported"));
    EXPECT_THAT(refused("aes", "", 32), HasSubstr("not supported"));
}

/// RFC 6070.
TEST(KdfTest, Pbkdf2) {
    const auto derive = [](std::string_view secret, std::string_view salt, std::uint32_t iterations, std::size_t size) {
        Bytes key(size);
        must(crypto::pbkdf2("sha1", text_bytes(secret), text_bytes(salt), iterations, key));
        return key;
    };
    EXPECT_EQ(derive("password", "salt", 1, 20), hex("0c60c80f961f0e71f3a9b524af6012062fe037a6"));
    EXPECT_EQ(derive("password", "salt", 4096, 20), hex("4b007901b765489abead49d926f721d065a429c1"));
    EXPECT_EQ(derive("passwordPASSWORDpassword", "saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25),
              hex("3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"));
    Bytes key(20);
    EXPECT_FALSE(crypto::pbkdf2("sha1", key, key, 0, key));
    EXPECT_FALSE(crypto::pbkdf2("sha1", key, key, 0xffffffff, key));
    EXPECT_FALSE(crypto::pbkdf2("md5", key, key, 1000, key));
}

TEST(KdfTest, HashesOfLuks) {
    const auto hash = [](const std::string& name) {
        Bytes bytes(must(crypto::hash_size(name)));
        must(crypto::digest(name, text_bytes("abc"), bytes));
        return bytes;
    };
    EXPECT_EQ(hash("sha1"), hex("a9993e364706816aba3e25717850c26c9cd0d89d"));
    EXPECT_EQ(hash("sha256"), hex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
    EXPECT_EQ(hash("ripemd160"), hex("8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"));
    EXPECT_EQ(hash("sha512").size(), 64U);
}

TEST(KdfTest, EveryPartOfASplitKeyIsNeeded) {
    const auto key = counting(40);
    Bytes parts(key.size() * 100);
    must(crypto::split("sha256", key, parts));
    Bytes merged(key.size());
    must(crypto::merge("sha256", parts, merged));
    EXPECT_EQ(merged, key);
    for (const std::size_t at : {std::size_t{0}, std::size_t{2011}, parts.size() - 1}) {
        auto damaged = parts;
        damaged[at] ^= std::byte{1};
        must(crypto::merge("sha256", damaged, merged));
        EXPECT_NE(merged, key);
    }
}

}  // namespace
}  // namespace qcow::test
