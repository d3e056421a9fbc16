#pragma once
// Certificates and keys, made for the test.

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "qcow/serve.h"
#include "support/subprocess.h"
#include "support/temporary_directory.h"

namespace qcow::test {

/// Signs certificates. Its own is DIRECTORY/ca-cert.pem, in each directory that it issues something for.
class Authority {
public:
    Authority(const TemporaryDirectory& directory, const std::string& name);

    [[nodiscard]] std::string certificate() const { return path_ + "-cert.pem"; }

    /// `kind` is "server" or "client": DIRECTORY/KIND-cert.pem and KIND-key.pem.
    void issue(const std::string& directory, const std::string& kind, const std::string& template_text) const;

    /// Lists `revoked` in the file `list`.
    void revoke(const std::string& revoked, const std::string& list) const;

private:
    static void make_key(const std::string& file);
    static void certtool(std::vector<std::string> arguments, const std::string& info, const std::string& out);

    std::string path_;
};

inline const std::string for_a_server = "cn = localhost\ndns_name = localhost\ntls_www_server\n";
inline const std::string for_a_client = "cn = client\ntls_www_client\n";

inline const std::string alices_key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
inline const std::string bobs_key = "0011223344556677";
inline const std::string other_key = "ff112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A directory with certificates of two authorities, and keys.
class TlsFiles : public testing::Test {
protected:
    TlsFiles();

    [[nodiscard]] NbdTls certificates(bool verify_peer = false) const;
    [[nodiscard]] NbdTls keys() const { return {.psk_file = directory_ / "keys.psk"}; }

    TemporaryDirectory directory_;
    Authority ours_{directory_, "ours"};
};

}  // namespace qcow::test
