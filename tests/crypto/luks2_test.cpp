// LUKS2 disks, which cryptsetup makes and qcow reads and writes.

#include <gmock/gmock.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/bits.h"
#include "crypto/block.h"
#include "crypto/kdf.h"
#include "support/bytes.h"
#include "support/random.h"
#include "support/result.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::AnyOf;
using testing::HasSubstr;
using testing::Not;

constexpr std::uint64_t data_at = 16 * MiB;
constexpr std::uint64_t header_bytes = 16 * KiB;
const Arguments quick_pbkdf2 = {"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"};
const Arguments quick_argon2 = {
    "--pbkdf", "argon2id", "--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "2"};

class Luks2Test : public ToolTest {
protected:
    void SetUp() override {
        std::ofstream(directory_.file("key")) << "x";
        std::ofstream(directory_.file("other")) << "y";
    }

    void cryptsetup(Arguments arguments) const {
        arguments.insert(arguments.begin(), {"cryptsetup", "-q"});
        const auto done = run(arguments, directory_.path());
        EXPECT_EQ(done.status, 0) << done.text();
    }

    /// Makes disk.luks, of 1 MiB and some.
    void make(const Arguments& kdf, const Arguments& more = {}) const {
        std::ofstream(directory_.file("disk.luks"), std::ios::binary);
        std::filesystem::resize_file(directory_.file("disk.luks"), data_at + MiB + 4096);
        cryptsetup(joined_arguments(joined_arguments({"luksFormat", "--type", "luks2", "--key-file", "key"}, kdf),
                                    joined_arguments(more, {"disk.luks"})));
    }

    [[nodiscard]] Finished opened(const Arguments& more) const {
        return tool(joined_arguments({"read", "-f", "luks"}, joined_arguments(more, {"disk.luks", "0", "512"})));
    }

    /// Changes the metadata in both copies of the header.
    void edit(const std::function<void(json&)>& change) const {
        auto file = text_bytes(bytes_of("disk.luks"));
        constexpr std::size_t checksum_at = 448;
        for (std::size_t at = 0; at < 2 * header_bytes; at += header_bytes) {
            const auto header = std::span(file).subspan(at, header_bytes);
            const auto area = header.subspan(4096);
            auto metadata = json::parse(reinterpret_cast<const char*>(area.data()));
            change(metadata);
            std::ranges::fill(area, std::byte{0});
            std::ranges::copy(text_bytes(metadata.dump()), area.begin());
            std::ranges::fill(header.subspan(checksum_at, 64), std::byte{0});
            Bytes checksum(32);
            must(crypto::digest("sha256", header, checksum));
            std::ranges::copy(checksum, header.subspan(checksum_at).begin());
        }
        std::ofstream(directory_.file("bad.luks"), std::ios::binary)
            .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
    }

    [[nodiscard]] std::string refusal_after(const std::function<void(json&)>& change) const {
        edit(change);
        const auto read = tool({"read", "-f", "luks", "--key", "key", "bad.luks", "0", "512"});
        EXPECT_EQ(read.status, 1);
        return read.err;
    }
};

TEST_F(Luks2Test, DataAreWhatTheKernelReads) {
    auto random = Random::named("luks2");
    for (const std::size_t sector_bytes : {512, 1024, 4096}) {
        make(quick_pbkdf2, {"--sector-size", std::to_string(sector_bytes)});
        auto guest = random.bytes(MiB + 4096);
        std::ofstream(directory_.file("guest"), std::ios::binary) << guest;
        const auto write = [&](const std::string& offset) {
            const auto done = run({"sh", "-c", QCOW_TOOL " write -f luks --key key disk.luks " + offset + " < guest"},
                                  directory_.path());
            EXPECT_EQ(done.status, 0) << done.text();
        };
        write("0");
        // Within sectors.
        std::ofstream(directory_.file("guest"), std::ios::binary) << "some text";
        write("123450");
        guest.replace(123450, 9, "some text");
        must_tool({"convert", "-f", "luks", "--key", "key", "-O", "raw", "disk.luks", "back.raw"});
        EXPECT_TRUE(bytes_of("back.raw") == guest);

        cryptsetup(
            {"luksDump", "--dump-volume-key", "--volume-key-file", "volume-key", "--key-file", "key", "disk.luks"});
        const auto cipher =
            crypto::openssl_cipher("aes", "xts", text_bytes(bytes_of("volume-key")), crypto::Direction::decrypt);
        std::filesystem::remove(directory_.file("volume-key"));
        auto data = text_bytes(bytes_of("disk.luks").substr(data_at));
        for (std::size_t at = 0; at < data.size(); at += sector_bytes) {
            Bytes number(16);
            for (std::size_t i = 0; i < 8; ++i) number[i] = static_cast<std::byte>((at / 512) >> (8 * i));
            cipher->run(number, std::span(data).subspan(at, sector_bytes));
        }
        EXPECT_TRUE(data == text_bytes(guest)) << sector_bytes;
    }
}

TEST_F(Luks2Test, KeySlots) {
    make(quick_argon2);
    cryptsetup(
        joined_arguments(joined_arguments({"luksAddKey", "--key-file", "key"}, quick_pbkdf2), {"disk.luks", "other"}));
    EXPECT_EQ(opened({"--key", "key"}).status, 0);
    EXPECT_EQ(opened({"--key", "other"}).status, 0);
    std::ofstream(directory_.file("wrong")) << "z";
    EXPECT_THAT(opened({"--key", "wrong"}).err, HasSubstr("the key is wrong: it opens none of the 2 key slots in use"));
    EXPECT_THAT(must_tool({"info", "-f", "luks", "disk.luks"}).out,
                AllOf(HasSubstr("luks2, aes-xts-plain64, 512-bit key"), HasSubstr("2 of 32 key slots used (0 1)")));
    cryptsetup({"luksKillSlot", "disk.luks", "0", "--key-file", "other"});
    EXPECT_THAT(opened({"--key", "key"}).err, HasSubstr("the key is wrong"));
    expect_refusal({"amend", "-f", "luks", "--key", "other", "--object", "secret,id=n,data=n", "-o",
                    "encrypt.state=active,encrypt.new-secret=n", "disk.luks"},
                   HasSubstr("cryptsetup"));
    EXPECT_THAT(tool({"resize", "-f", "luks", "--key", "other", "disk.luks", "1053000"}).err,
                HasSubstr("multiple of 4096"));
    must_tool({"resize", "-f", "luks", "--key", "other", "disk.luks", "2M"});
    EXPECT_THAT(must_tool({"info", "-f", "luks", "disk.luks"}).out, HasSubstr("2 MiB"));
    cryptsetup({"open", "--test-passphrase", "--key-file", "other", "disk.luks"});
}

/// Numbers of a header are bounded before anything is computed, and what is not supported is named.
TEST_F(Luks2Test, WhatIsRefused) {
    make(quick_argon2);
    const auto kdf = [](json& metadata) -> json& { return metadata["keyslots"]["0"]["kdf"]; };
    EXPECT_THAT(refusal_after([&](json& metadata) { kdf(metadata)["time"] = 1'000'000; }),
                HasSubstr("--max-kdf-seconds"));
    EXPECT_THAT(refusal_after([&](json& metadata) { kdf(metadata)["memory"] = 2'000'000'000; }), HasSubstr("memory"));
    EXPECT_THAT(refusal_after([&](json& metadata) { metadata["digests"]["0"]["iterations"] = 2'000'000'000; }),
                HasSubstr("--max-kdf-seconds"));
    // What libcryptsetup would take for other numbers.
    for (const auto* const name : {"time", "memory", "cpus"}) {
        for (const json& value : {json(-1), json(-2'000'000'000), json(4'294'967'296)}) {
            EXPECT_THAT(refusal_after([&](json& metadata) { kdf(metadata)[name] = value; }),
                        AllOf(HasSubstr(name), HasSubstr("no number from 0")));
        }
    }
    EXPECT_THAT(refusal_after([&](json& metadata) { metadata["digests"]["0"]["iterations"] = -1; }),
                HasSubstr("no number from 0"));
    for (const json& value : {json(4'000'000), json(-1), json(2'147'483'648)}) {
        EXPECT_THAT(refusal_after([&](json& metadata) { metadata["keyslots"]["0"]["key_size"] = value; }),
                    AnyOf(HasSubstr("key_size"), HasSubstr("does not accept")));
        EXPECT_THAT(refusal_after([&](json& metadata) { metadata["keyslots"]["0"]["area"]["key_size"] = value; }),
                    HasSubstr("key_size"));
        EXPECT_THAT(refusal_after([&](json& metadata) { metadata["keyslots"]["0"]["af"]["stripes"] = value; }),
                    HasSubstr("stripes"));
    }
    EXPECT_THAT(refusal_after([](json& metadata) {
                    metadata["segments"]["0"]["integrity"] = {
                        {"type", "hmac(sha256)"}, {"journal_encryption", "none"}, {"journal_integrity", "none"}};
                }),
                HasSubstr("dm-integrity"));
    EXPECT_THAT(refusal_after([](json& metadata) { metadata["config"]["requirements"]["mandatory"] = {"magic"}; }),
                HasSubstr("magic"));
    EXPECT_THAT(refusal_after([](json& metadata) { metadata["segments"]["0"]["encryption"] = "rot13-xts-plain64"; }),
                HasSubstr("rot13"));
    EXPECT_THAT(refusal_after([](json& metadata) { metadata["segments"]["0"]["offset"] = "1099511627776"; }),
                HasSubstr("past the end"));
    EXPECT_THAT(refusal_after([](json& metadata) { metadata["segments"]["0"]["size"] = "1099511627776"; }),
                HasSubstr("1099511627776"));
    EXPECT_THAT(refusal_after([](json& metadata) { metadata["segments"] = json::object(); }),
                Not(HasSubstr("exception")));
    EXPECT_THAT(refusal_after([](json& metadata) { metadata = json::object(); }), HasSubstr("damaged"));
    EXPECT_THAT(refusal_after([](json& metadata) { metadata["keyslots"]["0"]["area"]["size"] = "999999999999"; }),
                HasSubstr("bad.luks"));
}

/// Each damage of the binary part is named. `both`: of the two copies; otherwise of the first one alone.
TEST_F(Luks2Test, DamageIsNamed) {
    make(quick_pbkdf2);
    const auto whole = bytes_of("disk.luks");
    const auto read = [&](const std::string& bytes) {
        put_file(directory_.file("bad.luks"), bytes);
        return tool({"read", "-f", "luks", "--key", "key", "bad.luks", "0", "512"});
    };
    struct Damage {
        const char* what;
        std::size_t at;
        std::string bytes;
        bool both;
        const char* error;  // empty: the other copy of the header serves
    };
    const std::vector<Damage> all = {
        {"magic", 0, "X", false, "it does not begin with \"LUKS"},
        {"version", 6, std::string("\0\x03", 2), false, "version 3 instead of 1"},
        {"length", 8, std::string(8, '\xff'), false, "it would have 18446744073709551615 bytes"},
        {"no length", 8, std::string(8, '\0'), false, "it would have 0 bytes"},
        {"checksum", 448, "####", false, ""},
        {"checksums", 448, "####", true, "the checksums of both copies of the header are wrong"},
        {"metadata", 4200, "#", false, ""},
        {"both metadata", 4200, "#", true, "the checksums of both copies of the header are wrong"},
        {"hash of the checksum", 72, "rot13", true, "the checksums of both copies of the header are wrong"},
    };
    for (const auto& [what, at, damage, both, error] : all) {
        SCOPED_TRACE(what);
        auto bytes = whole;
        bytes.replace(at, damage.size(), damage);
        if (both) bytes.replace(header_bytes + at, damage.size(), damage);
        const auto done = read(bytes);
        EXPECT_EQ(done.status, *error == '\0' ? 0 : 1);
        EXPECT_THAT(done.err, HasSubstr(error));
    }
    EXPECT_THAT(read(whole.substr(0, 4000)).err, HasSubstr("the file has 4000 bytes, and the two copies"));
    EXPECT_THAT(read(whole.substr(0, 100'000)).err, HasSubstr("past the end of the file (100000 bytes)"));
}

}  // namespace
}  // namespace qcow::test
