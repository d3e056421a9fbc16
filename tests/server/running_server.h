#pragma once
// A server on a Unix socket, on a thread of its own.

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "qcow/serve.h"
#include "server/nbd_client.h"
#include "server/test_disk.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow::test {

class RunningServer {
public:
    explicit RunningServer(std::vector<NbdExport> exports, const NbdOptions& options = {})
        : server_(must(NbdServer::make(std::move(exports), options))) {
        must(server_->listen_unix(socket()));
        thread_ = std::thread([this] { result_ = server_->run(); });
    }
    RunningServer(const RunningServer&) = delete;
    RunningServer& operator=(const RunningServer&) = delete;
    ~RunningServer() {
        if (thread_.joinable()) static_cast<void>(stop());
    }

    [[nodiscard]] std::string socket() const { return directory_ / "socket"; }

    Result<void> stop() {
        server_->stop();
        return wait();
    }

    Result<void> wait() {
        thread_.join();
        return result_;
    }

private:
    TemporaryDirectory directory_;
    std::unique_ptr<NbdServer> server_;
    Result<void> result_;
    std::thread thread_;
};

/// Whether the server ends well, and soon enough for one whose clients do not hold it up.
inline testing::AssertionResult must_stop(RunningServer& server) {
    const auto begin = std::chrono::steady_clock::now();
    const auto result = server.stop();
    if (!result) return testing::AssertionFailure() << result.error().message();
    if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(4))
        return testing::AssertionFailure() << "it took as long as the server waits for those that are stuck";
    return testing::AssertionSuccess();
}

}  // namespace qcow::test
