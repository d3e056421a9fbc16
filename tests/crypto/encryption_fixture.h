#pragma once
// What tests of encrypted images share.

#include <fmt/format.h>

#include <fstream>

#include "base/bits.h"
#include "support/bytes.h"
#include "support/random.h"
#include "tool/tool_fixture.h"

namespace qcow::test {

inline const std::string secret_option = "secret,id=s,data=x";

/// A cipher of new images.
struct CipherCase {
    std::string cipher;
    std::string mode;
    std::string ivgen;
    std::string ivgen_hash;
    std::string hash;
    bool qemu = true;  // Debian's QEMU makes it

    [[nodiscard]] std::string options(const std::string& prefix) const {
        auto text = fmt::format(
            "{0}key-secret=s,{0}cipher-alg={1},{0}cipher-mode={2},{0}ivgen-alg={3},{0}hash-alg={4},"
            "{0}iter-time=10",
            prefix, cipher, mode, ivgen, hash);
        if (!ivgen_hash.empty()) text += fmt::format(",{}ivgen-hash-alg={}", prefix, ivgen_hash);
        return text;
    }
    [[nodiscard]] std::string text() const { return options(""); }
};

inline const CipherCase usual_cipher = {"aes-256", "xts", "plain64", "", "sha256"};

class EncryptionTest : public ToolTest {
protected:
    void SetUp() override {
        auto random = Random::named("encryption");
        auto bytes = random.bytes(700'000);
        bytes.resize(3'000'000);
        bytes += random.bytes(123'456);
        bytes.resize(4 * MiB + 512);
        std::ofstream(directory_.file("disk.raw"), std::ios::binary) << bytes;
        std::ofstream(directory_.file("key")) << "x";
        std::ofstream(directory_.file("wrong")) << "y";
    }

    static std::string opened(const std::string& driver, const std::string& file) {
        const auto* const prefix = driver == "luks" ? "" : "encrypt.";
        return fmt::format("driver={},file.filename={},{}key-secret=s", driver, file, prefix);
    }

    /// QEMU cannot always measure how long its key derivation takes.
    bool qemu_makes(const Arguments& arguments) const {
        for (int i = 0; i < 30; ++i) {
            const auto made = qemu_img(arguments, directory_.path());
            if (made.status == 0) return true;
            if (made.err.find("CPU usage") == std::string::npos) break;
        }
        return false;
    }

    void expect_qemu_reads(const std::string& driver, const std::string& file, const std::string& what,
                           const std::string& raw = "disk.raw") const {
        const auto compared = qemu_img({"compare", "--object", secret_option, "--image-opts", opened(driver, file),
                                        "driver=raw,file.filename=" + raw},
                                       directory_.path());
        EXPECT_EQ(compared.status, 0) << what << ": " << compared.text();
    }

    void expect_qcow_reads(const std::string& format, const std::string& file, const std::string& what,
                           const std::string& raw = "disk.raw") const {
        const auto compared = tool({"compare", "--key", "key", "-f", format, "-F", "raw", file, raw});
        EXPECT_EQ(compared.status, 0) << what << ": " << compared.text();
    }

    void make_qcow2(const std::string& name, const std::string& more = "") const {
        must_tool({"convert", "-f", "raw", "-O", "qcow2", "--object", secret_option, "-o",
                   "encrypt.format=luks," + usual_cipher.options("encrypt.") + more, "disk.raw", name});
    }

    [[nodiscard]] Bytes file(const std::string& name) const {
        const auto text = bytes_of(name);
        return text_bytes(text);
    }

    void poke(const std::string& name, std::uint64_t at, std::string_view bytes) const {
        std::fstream file(directory_.file(name), std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(static_cast<std::streamoff>(at));
        file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
};

}  // namespace qcow::test
