#pragma once
// The first part of a connection: client and server agree on an export and on the form of requests.

#include <optional>
#include <span>

#include "server/nbd/input.h"
#include "server/nbd/session.h"

namespace qcow::nbd {

/// What is known of a client before it asks for anything.
struct Greeting {
    bool no_zeroes = false;  ///< it wants no padding
    bool tls = false;        ///< what follows comes through TLS
};

/// Returns nothing if the client does not speak the protocol.
std::optional<Greeting> greet(Stream& stream, Input& input);

/// Refuses everything until the client asks for TLS, which is to begin with the stream's next byte. Returns false
/// if the client left or cannot go on. Nothing that it has said so far may count behind TLS: it may have been said by
/// somebody in between.
bool await_tls(Stream& stream, Input& input);

/// Negotiates until the client chooses an export. Returns nothing if it left, or does not speak the protocol. Every
/// export has its built-in contexts among its contexts here, and there is at least one.
std::optional<Session> negotiate(Stream& stream, Input& input, const Greeting& greeting,
                                 std::span<const NbdExport> exports);

/// The flags that a client is told about an export.
std::uint16_t transmission_flags(const NbdExport& exported, Style style);

}  // namespace qcow::nbd
