// Other people's clients on `qcow serve`, through TLS: libnbd's and QEMU's.

#ifdef QCOW_HAS_TLS

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "server/certificates.h"
#include "support/disks.h"
#include "support/qemu.h"

namespace qcow::test {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

class TlsClients : public TlsFiles {
protected:
    void SetUp() override {
        put_file(directory_ / "disk.raw", random_.bytes(std::size_t{5} << 20));
        must_run({"truncate", "-s", "20M", "disk.raw"}, directory_.path());
        must_run({"truncate", "-s", "20M", "target.raw"}, directory_.path());
    }

    void serve(Arguments arguments) {
        arguments.insert(arguments.begin(),
                         {QCOW_TOOL, "serve", "--socket", "socket", "--persistent", "--pid-file", "pid"});
        server_ = std::make_unique<Subprocess>(arguments, directory_.path());
        for (int i = 0; i < 1000 && !std::filesystem::exists(directory_ / "pid"); ++i)
            std::this_thread::sleep_for(milliseconds(10));
    }

    /// SIGTERM; the server is to end well.
    void stop() {
        server_->signal(SIGTERM);
        const auto finished = server_->finish();
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_THAT(finished.err,
                    testing::MatchesRegex("(qcow: WARNING: [^\n]* can be read[^\n]*\n)?qcow: sandbox: [^\n]*\n"));
    }

    [[nodiscard]] std::string uri(const std::string& certificates = "client") const {
        return "nbds+unix:///?socket=" + (directory_ / "socket") + "&tls-certificates=" + (directory_ / certificates);
    }
    [[nodiscard]] std::string psk_uri(const std::string& name, const std::string& file = "keys.psk") const {
        return "nbds+unix://" + name + "@/?socket=" + (directory_ / "socket") + "&tls-psk-file=" + (directory_ / file);
    }

    /// qemu-img's description of the disk behind credentials.
    [[nodiscard]] Finished qemu_info(const std::string& credentials, const std::string& options = "") const {
        return qemu_img(
            {"info", "--output=json", "--object", credentials + ",id=tls,endpoint=client", "--image-opts",
             "driver=nbd,server.type=unix,server.path=" + (directory_ / "socket") + ",tls-creds=tls" + options},
            directory_.path());
    }

    void expect_same(const std::string& a, const std::string& b) const {
        EXPECT_EQ(first_difference(ReferenceFile(directory_ / a), ReferenceFile(directory_ / b)), std::nullopt);
    }

    Random random_ = Random::named("tls clients");
    std::unique_ptr<Subprocess> server_;
};

TEST_F(TlsClients, NbdcopyBothWaysOverSeveralConnections) {
    serve({"--tls-certificates", "pki", "--tls-verify-peer", "--format", "raw", "target.raw"});
    const auto info = nlohmann::json::parse(must_run({"nbdinfo", "--json", uri()}).out);
    EXPECT_EQ(info["TLS"], true);
    EXPECT_EQ(info["exports"][0]["can_multi_conn"], true);
    must_run({"nbdcopy", "--flush", "--connections=4", "disk.raw", uri()}, directory_.path());
    must_run({"nbdcopy", "--connections=4", uri(), "copy.raw"}, directory_.path());
    stop();
    expect_same("disk.raw", "target.raw");
    expect_same("disk.raw", "copy.raw");
}

TEST_F(TlsClients, Libnbd) {
    const Authority theirs(directory_, "theirs");
    theirs.issue(directory_ / "stranger", "client", for_a_client);
    serve({"--read-only", "--tls-certificates", "pki", "--tls-verify-peer", "disk.raw"});
    const auto plain = run({"nbdinfo", "nbd+unix:///?socket=" + (directory_ / "socket")});
    EXPECT_NE(plain.status, 0);
    EXPECT_THAT(plain.err, HasSubstr("not supported"));
    EXPECT_NE(run({"nbdinfo", uri("stranger")}).status, 0);
    std::filesystem::create_directory(directory_ / "nobody");
    std::filesystem::copy_file(ours_.certificate(), directory_ / "nobody/ca-cert.pem");
    EXPECT_NE(run({"nbdinfo", uri("nobody")}).status, 0);
    EXPECT_EQ(must_run({"nbdinfo", "--size", uri()}).out, "20971520\n");
    stop();
}

TEST_F(TlsClients, LibnbdWithKeys) {
    write_file(directory_ / "wrong.psk", "alice:" + other_key + "\ncarol:" + other_key + "\n");
    serve({"--tls-psk", "keys.psk", "--format", "raw", "target.raw"});
    EXPECT_NE(run({"nbdinfo", psk_uri("alice", "wrong.psk")}).status, 0);
    EXPECT_NE(run({"nbdinfo", psk_uri("carol", "wrong.psk")}).status, 0);
    EXPECT_NE(run({"nbdinfo", uri()}).status, 0);
    must_run({"nbdcopy", "--flush", "disk.raw", psk_uri("alice")}, directory_.path());
    stop();
    expect_same("disk.raw", "target.raw");
}

TEST_F(TlsClients, Qemu) {
    serve({"--read-only", "--tls-certificates", "pki", "--tls-verify-peer", "disk.raw"});
    const auto x509 = "tls-creds-x509,dir=" + (directory_ / "client");
    const auto info = qemu_info(x509, ",tls-hostname=localhost");
    ASSERT_EQ(info.status, 0) << info.text();
    EXPECT_EQ(nlohmann::json::parse(info.out)["virtual-size"], 20 << 20);
    EXPECT_NE(qemu_info(x509, ",tls-hostname=elsewhere").status, 0);
    EXPECT_NE(qemu_info("tls-creds-x509,dir=" + (directory_ / "pki"), ",tls-hostname=localhost").status, 0);
    must_qemu_img(
        {"convert", "--object", x509 + ",id=tls,endpoint=client", "--image-opts", "-O", "raw",
         "driver=nbd,server.type=unix,server.path=" + (directory_ / "socket") + ",tls-creds=tls,tls-hostname=localhost",
         "copy.raw"},
        directory_.path());
    stop();
    expect_same("disk.raw", "copy.raw");
}

TEST_F(TlsClients, QemuWithKeys) {
    serve({"--read-only", "--tls-psk", "keys.psk", "disk.raw"});
    for (const std::string name : {"right", "wrong"}) {
        std::filesystem::create_directory(directory_ / name);
        write_file(directory_ / (name + "/keys.psk"), "alice:" + (name == "right" ? alices_key : other_key) + "\n");
    }
    const auto right = qemu_info("tls-creds-psk,username=alice,dir=" + (directory_ / "right"));
    EXPECT_EQ(right.status, 0) << right.text();
    EXPECT_NE(qemu_info("tls-creds-psk,username=alice,dir=" + (directory_ / "wrong")).status, 0);
    stop();
}

TEST_F(TlsClients, ManySmallRequestsAtOnce) {
    serve({"--tls-psk", "keys.psk", "--format", "raw", "target.raw"});
    const Arguments copy = {"nbdcopy", "--flush", "--connections=4", "--requests=64", "--request-size=4096"};
    auto to = copy;
    to.insert(to.end(), {"disk.raw", psk_uri("alice")});
    must_run(to, directory_.path());
    auto from = copy;
    from.insert(from.end(), {psk_uri("alice"), "copy.raw"});
    must_run(from, directory_.path());
    stop();
    expect_same("disk.raw", "target.raw");
    expect_same("disk.raw", "copy.raw");
}

TEST_F(TlsClients, AnOpenNetworkNeedsNoWarningIfClientsAreKnown) {
    const auto said = [&](const Arguments& tls) {
        Arguments command = {QCOW_TOOL, "serve", "-r", "-t", "--bind", "0.0.0.0", "--port", "0", "disk.raw"};
        command.insert(command.end(), tls.begin(), tls.end());
        Subprocess server(command, directory_.path());
        server.wait_for("listening on 0.0.0.0 port ");
        server.wait_for("sandbox");
        server.signal(SIGTERM);
        return server.finish().err;
    };
    const auto warns = testing::HasSubstr("WARNING: any client that can reach");
    EXPECT_THAT(said({"--tls-certificates", "pki", "--tls-verify-peer"}), testing::Not(warns));
    EXPECT_THAT(said({"--tls-psk", "keys.psk"}), testing::Not(warns));
    const auto encrypted = said({"--tls-certificates", "pki"});
    EXPECT_THAT(encrypted, warns);
    EXPECT_THAT(encrypted, testing::Not(testing::HasSubstr("unencrypted")));
}

TEST_F(TlsClients, SecretsThatAnybodyCanReadAreWarnedOf) {
    using std::filesystem::perms;
    for (const bool open : {false, true}) {
        std::filesystem::permissions(directory_ / "keys.psk",
                                     open ? perms::owner_read | perms::others_read : perms::owner_read);
        serve({"--read-only", "--tls-psk", "keys.psk", "disk.raw"});
        server_->signal(SIGTERM);
        const auto finished = server_->finish();
        EXPECT_EQ(finished.status, 0);
        EXPECT_EQ(finished.err.find("WARNING: keys.psk can be read") != std::string::npos, open) << finished.err;
    }
}

}  // namespace
}  // namespace qcow::test

#endif
