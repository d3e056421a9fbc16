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
    explicit RunningServer(std::vector<NbdExport> exports, const NbdOptions& options = {});
    RunningServer(const RunningServer&) = delete;
    RunningServer& operator=(const RunningServer&) = delete;
    ~RunningServer();

    [[nodiscard]] std::string socket() const { return directory_ / "socket"; }

    Result<void> stop();

    Result<void> wait();

private:
    TemporaryDirectory directory_;
    std::unique_ptr<NbdServer> server_;
    Result<void> result_;
    std::thread thread_;
};

/// Whether the server ends well, and soon enough for one whose clients do not hold it up.
testing::AssertionResult must_stop(RunningServer& server);

}  // namespace qcow::test
