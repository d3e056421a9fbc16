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
    Authority(const TemporaryDirectory& directory, const std::string& name) : path_(directory / name) {
        write_file(path_ + ".info", "cn = " + name + "\nca\ncert_signing_key\ncrl_signing_key\n");
        make_key(path_ + "-key.pem");
        certtool({"--generate-self-signed", "--load-privkey", path_ + "-key.pem"}, path_ + ".info", certificate());
    }

    [[nodiscard]] std::string certificate() const { return path_ + "-cert.pem"; }

    /// `kind` is "server" or "client": DIRECTORY/KIND-cert.pem and KIND-key.pem.
    void issue(const std::string& directory, const std::string& kind, const std::string& template_text) const {
        std::filesystem::create_directories(directory);
        std::filesystem::copy_file(certificate(), directory + "/ca-cert.pem",
                                   std::filesystem::copy_options::overwrite_existing);
        const auto key = directory + "/" + kind + "-key.pem";
        make_key(key);
        write_file(directory + "/info", template_text + "signing_key\nencryption_key\n");
        certtool({"--generate-certificate", "--load-privkey", key, "--load-ca-certificate", certificate(),
                  "--load-ca-privkey", path_ + "-key.pem"},
                 directory + "/info", directory + "/" + kind + "-cert.pem");
    }

    /// Lists `revoked` in the file `list`.
    void revoke(const std::string& revoked, const std::string& list) const {
        write_file(path_ + ".crl-info", "crl_next_update = 100\ncrl_number = 1\n");
        certtool({"--generate-crl", "--load-certificate", revoked, "--load-ca-certificate", certificate(),
                  "--load-ca-privkey", path_ + "-key.pem"},
                 path_ + ".crl-info", list);
    }

private:
    static void make_key(const std::string& file) {
        must_run({"certtool", "--generate-privkey", "--key-type", "ecdsa", "--outfile", file});
    }
    static void certtool(std::vector<std::string> arguments, const std::string& info, const std::string& out) {
        arguments.insert(arguments.begin(), "certtool");
        arguments.insert(arguments.end(), {"--template", info, "--outfile", out});
        must_run(arguments);
    }

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
    TlsFiles() {
        ours_.issue(directory_ / "pki", "server", for_a_server);
        ours_.issue(directory_ / "client", "client", for_a_client);
        write_file(directory_ / "keys.psk", "bob:" + bobs_key + "\nalice:" + alices_key + "\n");
    }

    [[nodiscard]] NbdTls certificates(bool verify_peer = false) const {
        return {.certificates = directory_ / "pki", .verify_peer = verify_peer};
    }
    [[nodiscard]] NbdTls keys() const { return {.psk_file = directory_ / "keys.psk"}; }

    TemporaryDirectory directory_;
    Authority ours_{directory_, "ours"};
};

}  // namespace qcow::test
