// `qcow serve` is killed under load, again and again on the same image: nothing is corrupt, nothing that was flushed is
// lost, nothing else than what was written appears.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "engine/image_kinds.h"
#include "engine/workload.h"
#include "server/remote_guest.h"
#include "support/effort.h"
#include "support/subprocess.h"

namespace qcow::test {
namespace {

using std::chrono::microseconds;

struct KillReport {
    unsigned kills = 0;
    std::uint64_t requests = 0;
    std::uint64_t leaks = 0;               ///< clusters, when everything was over
    std::optional<std::string> violation;  ///< the first one; nothing further was tried
};

class KilledServer {
public:
    KilledServer(const ImageKind& kind, Random random, bool forgets_flushes)
        : random_(std::move(random)), forgets_flushes_(forgets_flushes), snapshot_(kind.snapshot) {
        const auto prepared = prepare(kind, random_);
        save(prepared.files, directory_.path());
        prepared_ = prepared.contents;
        if (kind.below) base_ = file_bytes(directory_ / "base");
        const auto image = must_open(directory_ / image_name);
        size_ = image->size();
        block_size_ = image->block_size();
        account_ = std::make_unique<Account>(size_, block_size_, 1);
        for (std::uint64_t i = 0; i < account_->sectors; ++i) {
            const auto sector = std::span(prepared.contents).subspan(i * sector_bytes, sector_bytes);
            account_->model.preset(i, value_in(i, sector));
        }
    }

    KillReport run(unsigned kills) try {
        while (report_.kills < kills) {
            if (random_.chance(10)) kill_while_it_opens();
            start();
            adopt(read_values(socket(), account_->sectors));
            work_until_killed();
            verify_metadata(report_.kills % 4 == 0);
        }
        go_on_and_stop();
        return report_;
    } catch (const std::exception& e) {
        report_.violation = fmt::format("after {} kills: {}", report_.kills, e.what());
        return report_;
    }

private:
    static constexpr unsigned connections = 4;

    [[nodiscard]] std::string socket() const { return directory_ / "socket"; }

    void spawn() {
        // The socket stays, as the killed server left it.
        std::filesystem::remove(directory_ / "pid");
        server_ = std::make_unique<Subprocess>(
            Arguments{QCOW_TOOL, "serve", "--persistent", "--socket", "socket", "--pid-file", "pid", image_name},
            directory_.path());
    }

    void start() {
        spawn();
        for (int i = 0; i < 30000 && !std::filesystem::exists(directory_ / "pid"); ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (!std::filesystem::exists(directory_ / "pid")) {
            server_->signal(SIGKILL);
            throw std::runtime_error("cannot be served again: " + server_->finish().text());
        }
    }

    void wait(std::uint64_t most_microseconds) {
        std::this_thread::sleep_for(microseconds(random_.below(most_microseconds)));
    }

    /// SIGKILL; whether the server had ended by itself before.
    bool kill() {
        server_->signal(SIGKILL);
        const auto finished = server_->finish();
        if (finished.status != 0 && finished.status != 128 + SIGKILL) throw std::runtime_error(finished.text());
        if (finished.status != 0) ++report_.kills;
        return finished.status == 0;
    }

    void kill_while_it_opens() {
        spawn();
        wait(10'000);
        kill();
    }

    /// Holds what is there against the account, and begins a new one with it.
    void adopt(const std::vector<Value>& found) {
        if (auto wrong = account_->complaint(found)) throw std::runtime_error(*wrong);
        account_ = std::make_unique<Account>(size_, block_size_, account_->next_value);
        for (std::uint64_t i = 0; i < account_->sectors; ++i) account_->model.preset(i, found[i]);
    }

    /// Several guests at once, until they lose their server or `enough` says so.
    void work(const std::function<bool()>& enough, const std::function<void()>& meanwhile) {
        // The rarer flushes are, the more is in memory only.
        const Load load{random_.pick({0U, 1U, 4U, 15U}), forgets_flushes_};
        std::vector<std::unique_ptr<RemoteGuest>> guests;
        for (unsigned i = 0; i < connections; ++i) {
            const auto style = std::array{nbd::Style::simple, nbd::Style::structured, nbd::Style::extended}[i % 3];
            guests.push_back(std::make_unique<RemoteGuest>(socket(), style, *account_,
                                                           Random(random_.below(~std::uint64_t{0})), load));
        }
        in_threads(connections + 1, [&](unsigned t) {
            if (t == connections) return meanwhile();
            try {
                while (!enough()) guests[t]->burst();
            } catch (const Closed&) {
            }
        });
        for (const auto& guest : guests) report_.requests += guest->requests();
    }

    void work_until_killed() {
        bool stopped = false;
        work([] { return false; },
             [&] {
                 wait(random_.chance(25) ? 2'000 : 60'000);
                 // Some are killed while they complete what they have, flush and close.
                 if (random_.chance(20)) {
                     server_->signal(SIGTERM);
                     wait(5'000);
                 }
                 stopped = kill();
             });
        if (!stopped) return;
        const auto now = account_->tick();
        account_->model.flushed(now, now);
    }

    /// Corruption is a violation. Returns the clusters that leaked.
    std::uint64_t verify_metadata(bool with_qemu) {
        // Lazy refcounts are counted by whom opens the image next.
        if (value_of(open_alone(directory_ / image_name)->info()).dirty) return 0;
        const auto checked = qcow::test::run({QCOW_TOOL, "check", "--json", image_name}, directory_.path());
        if (checked.status != 0 && checked.status != 3) throw std::runtime_error(checked.text());
        if (with_qemu) {
            const auto theirs = qemu_img({"check", "-f", "qcow2", image_name}, directory_.path());
            if (theirs.status != 0 && theirs.status != 3) throw std::runtime_error(theirs.text());
        }
        return nlohmann::json::parse(checked.out)["leaks"];
    }

    /// A life without violence leaks nothing more; and what is below or beside was never touched.
    void go_on_and_stop() {
        const auto leaks = verify_metadata(true);
        start();
        adopt(read_values(socket(), account_->sectors));
        const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
        work([&] { return std::chrono::steady_clock::now() > end; }, [] {});
        server_->signal(SIGTERM);
        const auto finished = server_->finish();
        if (finished.status != 0) throw std::runtime_error(finished.text());
        const auto now = account_->tick();
        account_->model.flushed(now, now);
        start();
        adopt(read_values(socket(), account_->sectors));
        server_->signal(SIGTERM);
        server_->finish();

        report_.leaks = verify_metadata(true);
        if (report_.leaks > leaks)
            throw std::runtime_error(fmt::format("{} clusters leak, {} before it was served", report_.leaks, leaks));
        if (!base_.empty() && file_bytes(directory_ / "base") != base_)
            throw std::runtime_error("the backing file has changed");
        if (snapshot_) {
            qemu_convert_to_raw(image_name, "qcow2", "first.raw", "first", directory_.path());
            if (file_bytes(directory_ / "first.raw") !=
                std::string_view(reinterpret_cast<const char*>(prepared_.data()), prepared_.size()))
                throw std::runtime_error("the snapshot has changed");
        }
    }

    Random random_;
    bool forgets_flushes_;
    bool snapshot_;
    TemporaryDirectory directory_;
    Bytes prepared_;
    std::string base_;
    std::uint64_t size_ = 0;
    std::uint64_t block_size_ = 0;
    std::unique_ptr<Account> account_;
    std::unique_ptr<Subprocess> server_;
    KillReport report_;
};

ImageKind kind_called(const std::string& name) {
    for (auto& kind : image_kinds()) {
        if (kind.name == name) return kind;
    }
    throw std::runtime_error("no kind " + name);
}

class KillTest : public testing::TestWithParam<const char*> {};

TEST_P(KillTest, LosesNothingThatWasFlushed) {
    KilledServer server(kind_called(GetParam()), Random::named(std::string("kill ") + GetParam()), false);
    const auto report = server.run(rounds(12));
    ASSERT_FALSE(report.violation) << *report.violation << "\n" << replay_hint();
    std::cout << "covered " << report.kills << " kills of a server\ncovered " << report.requests
              << " requests to servers that were killed\n"
              << report.leaks << " clusters leaked\n";
}

INSTANTIATE_TEST_SUITE_P(Kinds, KillTest,
                         testing::Values("v3_512", "v3_4k", "v3_64k", "extended_16k", "extended_64k_over_qcow2",
                                         "over_qcow2_shorter_v3", "snapshot_4k", "extended_snapshot", "compressed_zstd",
                                         "lazy"),
                         [](const auto& test) { return std::string(test.param); });

/// That which is to be found: a server that says that it has flushed, but has not.
TEST(KillSelfTest, AFlushThatIsLeftOutIsFound) {
    KilledServer server(kind_called("v3_4k"), Random(1), true);
    const auto report = server.run(40);
    ASSERT_TRUE(report.violation);
    std::cout << *report.violation << "\n";
}

}  // namespace
}  // namespace qcow::test
