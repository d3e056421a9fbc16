#include "server/certificates.h"

namespace qcow::test {

Authority::Authority(const TemporaryDirectory& directory, const std::string& name) : path_(directory / name) {
    write_file(path_ + ".info", "cn = " + name + "\nca\ncert_signing_key\ncrl_signing_key\n");
    make_key(path_ + "-key.pem");
    certtool({"--generate-self-signed", "--load-privkey", path_ + "-key.pem"}, path_ + ".info", certificate());
}

void Authority::issue(const std::string& directory, const std::string& kind, const std::string& template_text) const {
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

void Authority::revoke(const std::string& revoked, const std::string& list) const {
    write_file(path_ + ".crl-info", "crl_next_update = 100\ncrl_number = 1\n");
    certtool({"--generate-crl", "--load-certificate", revoked, "--load-ca-certificate", certificate(),
              "--load-ca-privkey", path_ + "-key.pem"},
             path_ + ".crl-info", list);
}

void Authority::make_key(const std::string& file) {
    must_run({"certtool", "--generate-privkey", "--key-type", "ecdsa", "--outfile", file});
}

void Authority::certtool(std::vector<std::string> arguments, const std::string& info, const std::string& out) {
    arguments.insert(arguments.begin(), "certtool");
    arguments.insert(arguments.end(), {"--template", info, "--outfile", out});
    must_run(arguments);
}

TlsFiles::TlsFiles() {
    ours_.issue(directory_ / "pki", "server", for_a_server);
    ours_.issue(directory_ / "client", "client", for_a_client);
    write_file(directory_ / "keys.psk", "bob:" + bobs_key + "\nalice:" + alices_key + "\n");
}

NbdTls TlsFiles::certificates(bool verify_peer) const {
    return {.certificates = directory_ / "pki", .verify_peer = verify_peer};
}

}  // namespace qcow::test
