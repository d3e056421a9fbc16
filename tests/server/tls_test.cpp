// TLS: who gets in, who does not, and what those who meddle achieve.

#include <gmock/gmock.h>

#include "server/running_server.h"
#include "server/socket.h"

#ifdef QCOW_HAS_TLS

#include "server/certificates.h"
#include "server/nbd/tls.h"
#include "server/tls_client.h"

namespace qcow::test {
namespace {

using nbd::Command;
using nbd::Option;
using nbd::OptionReply;
using nbd::Style;
using std::chrono::milliseconds;
using std::chrono::steady_clock;
using testing::HasSubstr;

/// What clients have.
class Tls : public TlsFiles {
protected:
    [[nodiscard]] Wallet nothing() const { return {.trusted = ours_.certificate()}; }
    [[nodiscard]] Wallet wallet(const std::string& name = "client", const std::string& kind = "client") const {
        return {.trusted = ours_.certificate(),
                .certificate = directory_ / (name + "/" + kind + "-cert.pem"),
                .key = directory_ / (name + "/" + kind + "-key.pem")};
    }
    [[nodiscard]] static Wallet wallet_of_keys(const std::string& name, const std::string& key) {
        return {.psk_name = name, .psk = key};
    }
};

/// A server in this process, and clients who choose every byte.
class TlsServer : public Tls {
protected:
    void serve(const NbdTls& tls, NbdOptions options = {}) {
        options.tls = tls;
        server_.emplace(std::vector<NbdExport>{{"", "secret name", disk_}}, options);
    }

    /// What came of it: "served", or why not.
    std::string attempt(const Wallet& wallet) {
        try {
            TlsNbdClient client(server_->socket());
            client.greet();
            client.start_tls(wallet);
            client.negotiate(Style::extended);
            return client.read(0, 4096).error == 0 ? "served" : "a failed read";
        } catch (const std::runtime_error& error) {
            return error.what();
        }
    }

    std::shared_ptr<TestDisk> disk_ = std::make_shared<TestDisk>(16 * MiB);
    std::optional<RunningServer> server_;
};

TEST_F(TlsServer, WhoDoesNotAskForItLearnsNothing) {
    serve(certificates());
    TlsNbdClient client(server_->socket());
    client.greet();
    for (const auto option :
         {Option::list, Option::info, Option::go, Option::structured_reply, Option::extended_headers,
          Option::list_meta_context, Option::set_meta_context, static_cast<Option>(99)}) {
        for (const auto& data : {Bytes(), NbdClient::go_data(""), Bytes(100'000)}) {
            const auto replies = client.ask(option, data);
            ASSERT_EQ(replies.size(), 1U);
            EXPECT_EQ(replies[0].type, OptionReply::tls_required);
            EXPECT_THAT(replies[0].text(), testing::Not(HasSubstr("secret")));
        }
    }
    EXPECT_EQ(client.outcome(Option::starttls, as_bytes("x")), OptionReply::invalid);
    EXPECT_EQ(client.outcome(Option::abort), OptionReply::ack);
    EXPECT_TRUE(client.is_closed());

    TlsNbdClient old(server_->socket());
    old.greet();
    old.send_option(Option::export_name);
    EXPECT_THROW(static_cast<void>(old.receive(1)), Closed);
    EXPECT_TRUE(must_stop(*server_));
}

TEST_F(TlsServer, EndlessHagglingWithoutItIsEnded) {
    serve(certificates());
    TlsNbdClient client(server_->socket());
    client.greet();
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(client.outcome(Option::list), OptionReply::tls_required);
    EXPECT_TRUE(client.is_closed());
}

TEST_F(TlsServer, BothVersionsCarryBothDirections) {
    serve(certificates());
    Random random = Random::named("tls");
    disk_->fill(random);
    for (const std::string version : {"TLS1.2", "TLS1.3"}) {
        auto wallet = nothing();
        wallet.priority = "NORMAL:-VERS-ALL:+VERS-" + version;
        TlsNbdClient client(server_->socket());
        client.greet();
        client.start_tls(wallet);
        EXPECT_EQ(client.tls().version(), version);
        client.negotiate(Style::structured);
        const auto text = random.bytes(3'000'001);
        ASSERT_EQ(client.write(4097, as_bytes(text)), 0U);
        EXPECT_TRUE(std::ranges::equal(disk_->bytes().subspan(4097, text.size()), as_bytes(text)));
        const auto read = client.read(1000, 8 * MiB);
        EXPECT_TRUE(std::ranges::equal(disk_->bytes().subspan(1000, 8 * MiB), read.bytes));
    }
    for (const std::string version : {"TLS1.0", "TLS1.1"}) {
        auto wallet = nothing();
        wallet.priority = "LEGACY:-VERS-ALL:+VERS-" + version;
        EXPECT_NE(attempt(wallet), "served") << version;
    }
    EXPECT_EQ(attempt(nothing()), "served");
    EXPECT_TRUE(must_stop(*server_));
}

TEST_F(TlsServer, ItBeginsOnceAndNothingFromBeforeCounts) {
    serve(certificates());
    TlsNbdClient client(server_->socket());
    client.greet();
    EXPECT_EQ(client.outcome(Option::structured_reply), OptionReply::tls_required);
    client.start_tls(nothing());
    EXPECT_EQ(client.outcome(Option::set_meta_context, NbdClient::query_data("", {"base:allocation"})),
              OptionReply::invalid);
    EXPECT_EQ(client.outcome(Option::starttls), OptionReply::invalid);
    client.negotiate(Style::structured, {"base:allocation"});
    EXPECT_EQ(client.command(Command::flush, 0, 0), 0U);
}

TEST_F(TlsServer, WhatIsSlippedInBehindStarttlsIsNotTakenForTheClients) {
    serve(certificates());
    const auto option = [](Option number) {
        return (Wire() << nbd::option_magic << static_cast<std::uint32_t>(number) << std::uint32_t{0}).bytes;
    };
    // In one packet with it: there is not even an answer.
    TlsNbdClient together(server_->socket());
    together.greet();
    together.send(Wire() << option(Option::starttls) << option(Option::structured_reply));
    EXPECT_THROW(static_cast<void>(together.receive(1)), Closed);
    // Later: the handshake fails.
    TlsNbdClient later(server_->socket());
    later.greet();
    ASSERT_EQ(later.outcome(Option::starttls), OptionReply::ack);
    later.send(option(Option::structured_reply));
    EXPECT_THROW(later.begin_tls(nothing()), std::runtime_error);
    EXPECT_EQ(attempt(nothing()), "served");
}

TEST_F(TlsServer, WhoeverSpeaksSomethingElseIsDisconnected) {
    serve(certificates());
    Random random = Random::named("noise");
    const std::vector<std::string> noises = {
        "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        std::string(100'000, '\0'),
        std::string("\x16\x03\x01\xff\xff", 5) + std::string(0xffff, 'x'),                // a record that is too large
        std::string("\x16\x03\x01\x00\x00", 5) + std::string(1000, 'x'),                  // an empty one
        std::string("\x16\x03\x01\x00\x04\x01\xff\xff\xff", 9) + std::string(1000, 'x'),  // a hello of 16 MiB
        std::string("\x17\x03\x03\x00\x05hello", 10),                                     // data before there are keys
        std::string("\x15\x03\x03\x00\x02\x02\x28", 7),                                   // an alert
        random.bytes(5000),
    };
    for (const auto& noise : noises) {
        TlsNbdClient client(server_->socket());
        client.greet();
        ASSERT_EQ(client.outcome(Option::starttls), OptionReply::ack);
        try {
            client.send(as_bytes(noise));
        } catch (const Closed&) {
        }
        EXPECT_TRUE(client.is_closed()) << noise.substr(0, 20);
    }
    EXPECT_EQ(attempt(nothing()), "served");
    EXPECT_TRUE(must_stop(*server_));
}

TEST_F(TlsServer, WhoStallsIsDroppedAndHoldsUpNobody) {
    NbdOptions options;
    options.limits.handshake_seconds = 3;
    serve(certificates(), options);
    TlsNbdClient silent(server_->socket());
    TlsNbdClient half(server_->socket());
    TlsNbdClient dribbling(server_->socket());
    for (auto* client : {&silent, &half, &dribbling}) {
        client->greet();
        ASSERT_EQ(client->outcome(Option::starttls), OptionReply::ack);
    }
    const std::string hello = std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11);
    half.send(as_bytes(hello));
    const auto begin = steady_clock::now();
    EXPECT_EQ(attempt(nothing()), "served");
    EXPECT_LT(steady_clock::now() - begin, milliseconds(2700));
    // A byte now and then is not silence, but does not get anywhere either.
    bool dropped = false;
    for (int i = 0; i < 100 && !dropped; ++i) {
        try {
            dribbling.send(as_bytes(i < 11 ? hello.substr(static_cast<std::size_t>(i), 1) : "x"));
        } catch (const Closed&) {
            dropped = true;
        }
        std::this_thread::sleep_for(milliseconds(100));
    }
    EXPECT_TRUE(dropped);
    EXPECT_TRUE(silent.is_closed());
    EXPECT_TRUE(half.is_closed());
}

TEST_F(TlsServer, WhoStallsDoesNotHoldUpTheEnd) {
    serve(certificates());
    TlsNbdClient silent(server_->socket());
    silent.greet();
    ASSERT_EQ(silent.outcome(Option::starttls), OptionReply::ack);
    EXPECT_TRUE(must_stop(*server_));
    EXPECT_TRUE(silent.is_closed());
}

TEST_F(TlsServer, TheEndIsAnOrderlyOne) {
    serve(certificates());
    for (const bool by_client : {true, false}) {
        TlsNbdClient client(server_->socket());
        client.greet();
        client.start_tls(nothing());
        client.negotiate(Style::structured);
        if (by_client) {
            client.send(client.request(Command::disconnect, 0, 0));
        } else {
            EXPECT_TRUE(must_stop(*server_));
        }
        EXPECT_TRUE(client.is_closed());
        EXPECT_TRUE(client.tls().told_of_end());
    }
}

TEST_F(TlsServer, KeysChangeWhileDataFlowsInBothDirections) {
    serve(certificates());
    // So that replies come from the threads of the connection, while it receives.
    disk_->delay_microseconds = 300;
    TlsNbdClient client(server_->socket());
    client.greet();
    client.start_tls(nothing());
    client.negotiate(Style::structured);
    for (int i = 0; i < 20; ++i) ASSERT_EQ(client.write(0, Bytes(512)), 0U);
    // GnuTLS takes eight updates a second at most.
    for (unsigned round = 0; round < 12; ++round) {
        const Bytes data(200'000, static_cast<std::byte>(round + 1));
        std::size_t replies = 0;
        for (std::uint64_t i = 0; i < 16; ++i) {
            client.send(client.request(Command::write, i * MiB, data.size(), 0, i) << data);
            client.send(client.request(Command::read, i * MiB, data.size(), 0, 100 + i));
            if (i == 8) client.tls().update_keys();
        }
        while (replies < 32) {
            const auto chunk = client.chunk();
            ASSERT_EQ(chunk.error, 0U);
            replies += chunk.done ? 1 : 0;
        }
        for (std::uint64_t i = 0; i < 16; ++i) ASSERT_EQ(disk_->bytes()[i * MiB + data.size() - 1], data[0]);
        std::this_thread::sleep_for(milliseconds(130));
    }
    EXPECT_TRUE(must_stop(*server_));
}

TEST_F(TlsServer, ThereIsNoSecondHandshake) {
    serve(certificates());
    auto wallet = nothing();
    wallet.priority = "NORMAL:-VERS-ALL:+VERS-TLS1.2";
    TlsNbdClient client(server_->socket());
    client.greet();
    client.start_tls(wallet);
    client.negotiate(Style::structured);
    EXPECT_LT(client.tls().renegotiate(), 0);
    EXPECT_TRUE(client.is_closed());
    EXPECT_EQ(attempt(nothing()), "served");
}

TEST_F(TlsServer, ClientsAreVerified) {
    const Authority theirs(directory_, "theirs");
    theirs.issue(directory_ / "stranger", "client", for_a_client);
    ours_.issue(
        directory_ / "expired", "client",
        for_a_client + "activation_date = \"2001-01-01 00:00:00\"\nexpiration_date = \"2002-01-01 00:00:00\"\n");
    ours_.issue(directory_ / "locked-out", "client", for_a_client);
    serve(certificates(true));
    EXPECT_EQ(attempt(wallet()), "served");
    EXPECT_EQ(attempt(wallet("locked-out")), "served");
    EXPECT_NE(attempt(nothing()), "served");
    EXPECT_NE(attempt(wallet("stranger")), "served");
    EXPECT_NE(attempt(wallet("expired")), "served");
    // Signed by the right authority, but good for servers only.
    EXPECT_NE(attempt(wallet("pki", "server")), "served");
    EXPECT_EQ(attempt(wallet()), "served");
    EXPECT_TRUE(must_stop(*server_));
    EXPECT_EQ(disk_->reads, 3U);

    ours_.revoke(directory_ / "locked-out/client-cert.pem", directory_ / "pki/ca-crl.pem");
    serve(certificates(true));
    EXPECT_EQ(attempt(wallet()), "served");
    EXPECT_NE(attempt(wallet("locked-out")), "served");
    EXPECT_EQ(disk_->reads, 4U);
}

TEST_F(TlsServer, WithoutVerifyingAnybodyIsServedWhoTrustsTheServer) {
    const Authority theirs(directory_, "theirs");
    serve(certificates());
    EXPECT_EQ(attempt(nothing()), "served");
    EXPECT_THAT(attempt({.trusted = theirs.certificate()}), HasSubstr("verification"));
    EXPECT_NE(attempt(wallet_of_keys("alice", alices_key)), "served");
    EXPECT_EQ(attempt(nothing()), "served");
}

TEST_F(TlsServer, Keys) {
    serve(keys());
    for (const std::string version : {"+VERS-TLS1.2", "+VERS-TLS1.3"}) {
        const auto with = [&](const std::string& name, const std::string& key) {
            auto wallet = wallet_of_keys(name, key);
            wallet.priority = "NORMAL:-VERS-ALL:+ECDHE-PSK:+DHE-PSK:+PSK:" + version;
            return attempt(wallet);
        };
        EXPECT_EQ(with("alice", alices_key), "served");
        EXPECT_EQ(with("bob", bobs_key), "served");
        const auto wrong_key = with("alice", other_key);
        EXPECT_NE(wrong_key, "served");
        EXPECT_NE(with("bob", alices_key), "served");
        // Names cannot be found out.
        EXPECT_EQ(with("carol", alices_key), wrong_key);
        EXPECT_NE(attempt(wallet()), "served");
        EXPECT_EQ(with("alice", alices_key), "served");
    }
    EXPECT_TRUE(must_stop(*server_));
    EXPECT_EQ(disk_->reads, 6U);
}

TEST_F(Tls, TheyAreReadOnce) {
    NbdOptions options;
    options.tls = certificates(true);
    RunningServer server({{"", "", std::make_shared<TestDisk>(MiB)}}, options);
    std::filesystem::remove_all(directory_ / "pki");
    TlsNbdClient client(server.socket());
    client.greet();
    client.start_tls(wallet());
    client.negotiate(Style::simple);
    EXPECT_EQ(client.command(Command::flush, 0, 0), 0U);
}

TEST_F(Tls, ThatAreNotWhatTheyMustBe) {
    const auto made = [](const NbdTls& tls) {
        NbdOptions options;
        options.tls = tls;
        return NbdServer::make({{"", "", std::make_shared<TestDisk>(MiB)}}, options);
    };
    const auto pki = directory_ / "pki";
    const auto with = [&](const std::string& name, const std::string& contents) {
        std::filesystem::remove_all(directory_ / "copy");
        std::filesystem::copy(pki, directory_ / "copy");
        std::filesystem::remove(directory_ / ("copy/" + name));
        if (!contents.empty()) write_file(directory_ / ("copy/" + name), contents);
        return made({.certificates = directory_ / "copy", .verify_peer = true});
    };
    must(with("other", "x"));
    for (const std::string name : {"server-cert.pem", "server-key.pem", "ca-cert.pem"}) {
        EXPECT_TRUE(fails(with(name, ""), Errc::not_found, {"copy/" + name, "certtool"}));
        EXPECT_TRUE(fails(with(name, "no PEM"), Errc::invalid_argument, {"copy/" + name, "PEM"}));
    }
    EXPECT_TRUE(fails(with("server-key.pem", read_file(directory_ / "client/client-key.pem")), Errc::invalid_argument,
                      {"copy/server-key.pem", "not the key"}));
    EXPECT_TRUE(fails(with("ca-crl.pem", "no PEM"), Errc::invalid_argument, {"copy/ca-crl.pem", "revoked"}));

    const auto keys = [&](const std::string& contents) {
        write_file(directory_ / "some.psk", contents);
        return made({.psk_file = directory_ / "some.psk"});
    };
    must(keys("\na:00\r\nb:11"));
    EXPECT_TRUE(fails(keys(""), Errc::invalid_argument, {"some.psk", "no keys", "psktool"}));
    EXPECT_TRUE(fails(keys("a:00\nb"), Errc::invalid_argument, {"some.psk: line 2", "NAME:KEY"}));
    EXPECT_TRUE(fails(keys(":00"), Errc::invalid_argument, {"some.psk: line 1", "NAME:KEY"}));
    for (const std::string key : {"a:", "a:0", "a:xy", "a:001g", "a: 00", "a:00 "})
        EXPECT_TRUE(fails(keys(key), Errc::invalid_argument, {"some.psk: line 1", "hexadecimal"})) << key;
    EXPECT_TRUE(fails(keys("a:00\na:11"), Errc::invalid_argument, {"some.psk: line 2", "second time"}));
    // What is secret does not turn up in messages.
    EXPECT_EQ(keys("a:5ec4e7x").error().message().find("5ec4e7"), std::string::npos);
    EXPECT_TRUE(fails(made({.psk_file = directory_ / "absent.psk"}), Errc::not_found, {"absent.psk", "psktool"}));

    EXPECT_TRUE(fails(made({}), Errc::invalid_argument, {"certificates", "keys"}));
    EXPECT_TRUE(fails(made({.certificates = pki, .psk_file = directory_ / "keys.psk"}), Errc::invalid_argument));
    EXPECT_TRUE(fails(made({.verify_peer = true, .psk_file = directory_ / "keys.psk"}), Errc::invalid_argument,
                      {"keys.psk", "verify"}));
}

/// The stream by itself, on a socket that gives one byte at a time, or all that there is.
class TlsStreams : public Tls {
protected:
    class Below final : public Stream {
    public:
        explicit Below(int fd) : fd_(fd) {}
        std::size_t receive(std::span<std::byte> to) override {
            ++receives;
            const auto n = recv(fd_, to.data(), one_by_one ? 1 : to.size(), 0);
            return n < 0 ? 0 : static_cast<std::size_t>(n);
        }
        bool send(std::span<const std::byte> bytes) override {
            ++sends;
            return ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
        }
        void wait_forever() override { waits_forever = true; }
        void shutdown() override { ::shutdown(fd_, SHUT_RDWR); }

        bool one_by_one = false;
        bool waits_forever = false;
        unsigned receives = 0, sends = 0;

    private:
        int fd_;
    };

    TlsStreams() {
        int fds[2] = {};
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) throw std::runtime_error("socketpair");
        ours_fd_.reset(fds[0]);
        theirs_.reset(fds[1]);
        stream_ = tls_->over(below_.emplace(fds[0]));
    }

    /// The server's side of the handshake beside the client's.
    std::unique_ptr<TlsEnd> meet() {
        bool met = false;
        std::thread server([&] { met = stream_->shake_hands(); });
        std::unique_ptr<TlsEnd> client;
        try {
            client = std::make_unique<TlsEnd>(theirs_.get(), wallet_of_keys("alice", alices_key));
        } catch (const std::runtime_error& error) {
            ADD_FAILURE() << error.what();
        }
        server.join();
        EXPECT_TRUE(met);
        return client;
    }

    FileDescriptor ours_fd_{-1};
    FileDescriptor theirs_{-1};
    std::unique_ptr<nbd::Tls> tls_ = must(nbd::Tls::load(keys()));
    std::optional<Below> below_;
    std::unique_ptr<nbd::TlsStream> stream_;
};

TEST_F(TlsStreams, BytesThatComeOneByOneAreTheSameBytes) {
    below_->one_by_one = true;
    const auto client = meet();
    const auto text = Random::named("stream").bytes(40'000);
    client->send(as_bytes(text));
    Bytes taken(text.size());
    for (std::size_t count = 0; count < taken.size();) {
        const auto n = stream_->receive(std::span(taken).subspan(count));
        ASSERT_GT(n, 0U);
        count += n;
    }
    EXPECT_TRUE(std::ranges::equal(taken, as_bytes(text)));
}

TEST_F(TlsStreams, ManyRecordsAreReceivedAtOnce) {
    const auto client = meet();
    for (int i = 0; i < 100; ++i) client->send(Bytes(28));
    client->update_keys();
    for (int i = 0; i < 100; ++i) client->send(Bytes(28));
    below_->receives = 0;
    Bytes taken(10'000);
    EXPECT_EQ(stream_->receive(taken), 5600U);
    EXPECT_EQ(below_->receives, 1U);
}

TEST_F(TlsStreams, OneByteIsAskedForAndMoreIsThere) {
    const auto client = meet();
    client->send(as_bytes("ab"));
    Bytes one(1);
    EXPECT_EQ(stream_->receive(one), 1U);
    EXPECT_EQ(stream_->receive(one), 1U);
    EXPECT_EQ(one[0], std::byte{'b'});
}

TEST_F(TlsStreams, MuchIsSentInFewPieces) {
    const auto client = meet();
    below_->sends = 0;
    const Bytes bytes(256 * KiB, std::byte{7});
    std::thread sender([&] { EXPECT_TRUE(stream_->send(bytes)); });
    EXPECT_EQ(client->receive(bytes.size()), bytes);
    sender.join();
    EXPECT_LE(below_->sends, 4U);
    stream_->wait_forever();
    EXPECT_TRUE(below_->waits_forever);
}

TEST_F(TlsStreams, WhatWasTamperedWithIsTheEnd) {
    const auto client = meet();
    client->send(as_bytes("fine"));
    const std::string record("\x17\x03\x03\x00\x20tampered with, 32 bytes of that.", 37);
    ASSERT_EQ(::send(theirs_.get(), record.data(), record.size(), MSG_NOSIGNAL), 37);
    Bytes taken(100);
    EXPECT_EQ(stream_->receive(taken), 4U);
    EXPECT_EQ(stream_->receive(taken), 0U);
    EXPECT_EQ(stream_->receive(taken), 0U);
    EXPECT_FALSE(stream_->send(as_bytes("hello")));
    stream_->say_goodbye();
}

TEST_F(TlsStreams, APeerThatHasGoneIsTheEnd) {
    auto client = meet();
    theirs_.reset(-1);
    client.reset();
    Bytes taken(100);
    EXPECT_EQ(stream_->receive(taken), 0U);
    EXPECT_FALSE(stream_->send(Bytes(100)));
    stream_->say_goodbye();
}

TEST_F(TlsStreams, AHandshakeEndsWithThePeer) {
    theirs_.reset(-1);
    EXPECT_FALSE(stream_->shake_hands());
}

}  // namespace
}  // namespace qcow::test

#else

namespace qcow::test {
namespace {

TEST(NoTls, IsNotPartOfThisBuild) {
    NbdOptions options;
    options.tls = NbdTls{.certificates = "/pki"};
    EXPECT_TRUE(fails(NbdServer::make({{"", "", std::make_shared<TestDisk>(MiB)}}, options), Errc::unsupported,
                      {"/pki", "no TLS", "libgnutls28-dev"}));
}

}  // namespace
}  // namespace qcow::test

#endif
