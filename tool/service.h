#pragma once
// What commands share that run until they are stopped.

#include <CLI/CLI.hpp>
#include <csignal>
#include <functional>
#include <string>

#include "qcow/error.h"
#include "sandbox.h"

namespace tool {

/// Adds --sandbox and --user.
void add_sandbox_options(CLI::App& app, Sandbox& sandbox);

/// The service manager, if there is one that wants to be notified (NOTIFY_SOCKET).
class ServiceManager {
public:
    ServiceManager();
    ServiceManager(const ServiceManager&) = delete;
    ServiceManager& operator=(const ServiceManager&) = delete;
    ~ServiceManager();

    void tell(const std::string& state) const;

private:
    int fd_ = -1;
    bool connected_ = false;
};

/// A file with the ID of this process. The destructor removes it.
class PidFile {
public:
    PidFile() = default;
    PidFile(const PidFile&) = delete;
    PidFile& operator=(const PidFile&) = delete;
    ~PidFile();

    qcow::Result<void> write(const std::string& path);

private:
    std::string path_;
};

/// While this lives, SIGTERM, SIGINT and SIGHUP call `stop`, which must be async-signal-safe. One at a time.
class StopServiceOnSignals {
public:
    explicit StopServiceOnSignals(std::function<void()> stop);
    StopServiceOnSignals(const StopServiceOnSignals&) = delete;
    StopServiceOnSignals& operator=(const StopServiceOnSignals&) = delete;
    ~StopServiceOnSignals();
};

}  // namespace tool
